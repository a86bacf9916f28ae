"""A table in Markdown. Pure."""

from collections.abc import Iterable, Iterator, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> Iterator[str]:
    """Its lines; `align` has a letter for each column, l or r. Cells are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join({'l': ':--', 'r': '--:'}[letter] for letter in align)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
