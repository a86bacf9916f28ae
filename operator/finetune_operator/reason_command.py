"""`finetune explain REASON`: why a failure came about, how to find out, and what to change."""

import difflib
import re
from typing import Annotated

import typer

from finetune_api.reason_pages import page
from finetune_api.reasons import ADVICE, MEANINGS, Reason


def reasons_beginning(incomplete: str) -> list[str]:
    """What the shell offers while a reason is being typed, whatever its case."""
    return [reason for reason in Reason if reason.lower().startswith(incomplete.lower())]


def explain(
    reason: Annotated[
        str | None, typer.Argument(help="A reason as it stands in a status, an Event or a metric.", autocompletion=reasons_beginning)
    ] = None,
) -> None:
    """Tell what a reason means: its cause, what to check, what to change. Without one, list all of them."""
    if reason is None:
        for line in overview():
            typer.echo(line)
        return
    found = next((known for known in Reason if known.lower() == reason.lower()), None)
    if found is None:
        near = difflib.get_close_matches(reason.lower(), [known.lower() for known in Reason], n=3, cutoff=0.5)
        meant = ", ".join(known for word in near for known in Reason if known.lower() == word)
        typer.echo(f"there is no reason {reason!r}; {f'did you mean {meant}?' if meant else '`finetune explain` lists all'}", err=True)
        raise typer.Exit(2)
    typer.echo(plain(page(found)), nl=False)


def plain(markdown: str) -> str:
    """A page without Markdown's marks, and each command on a line of its own, which a terminal's user can copy."""
    unmarked = re.sub(r"^## |\*\*|`", "", re.sub(r"^- `(.*)`$", r"  \1", markdown, flags=re.MULTILINE), flags=re.MULTILINE)
    return unmarked.replace(":\n\n  ", ":\n  ")


def overview() -> list[str]:
    """A line for each reason: failures with what to do, the others with what they say."""
    width = max(map(len, Reason))
    told = {**{reason: advice.hint for reason, advice in ADVICE.items()}, **MEANINGS}
    return [f"{reason:{width}}  {words}" for reason, words in told.items()]
