"""The command line: `finetune`, and `kubectl finetune`, which is the same program. Here commands are named; each is at home elsewhere."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from finetune_api import KIND
from finetune_api.profile import PROFILE_KIND, TuningProfile, parse_profile
from finetune_api.v1alpha1 import parse_job
from finetune_operator.__main__ import installed_version
from finetune_operator.__main__ import main as run_operator
from finetune_operator.commands.listing import list_jobs
from finetune_operator.commands.logs import logs
from finetune_operator.commands.status import show_status
from finetune_operator.commands.steering import cancel, resume, retry, suspend
from finetune_operator.commands.submit import submit
from finetune_operator.compare import compare
from finetune_operator.local.chat import chat
from finetune_operator.local.command import local as run_here
from finetune_operator.local.measure import measure
from finetune_operator.manifest import EXIT_REFUSED, Manifest, ManifestError, exit_code, explain, read_file
from finetune_operator.plan_command import plan
from finetune_operator.profile_file import ProfileError, read_profile, under
from finetune_operator.reason_command import explain as explain_reason
from finetune_operator.settings import variables

app = typer.Typer(
    name="finetune",
    help="Tune language models: check manifests, run jobs on this machine, submit and follow jobs in a cluster, run the operator.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # lines of a paragraph are joined
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"finetune {installed_version()}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Options that stand before a command; the version's callback does it all."""


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(help="Manifests; `-` reads standard input.", metavar="FILE...", allow_dash=True)],
    local: Annotated[bool, typer.Option("--local", help="Allow file:// sources, as `finetune local` does.")] = False,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="A TuningProfile: check that the jobs keep within it, too.")] = None,
) -> None:
    """Check manifests of jobs and profiles as the API server would, without one.

    Exit codes: 0 accepted, 1 one is refused, 2 one cannot be read.
    """
    code = 0
    try:
        offer = read_profile(profile) if profile else None
    except ProfileError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(exit_code(error)) from None
    for file in files:
        try:
            problems = _problems(read_file(file), local, offer)
            worst = EXIT_REFUSED if problems else 0
        except ManifestError as error:
            problems, worst = [str(error)], exit_code(error)
        code = max(code, worst)
        for problem in problems:
            typer.echo(f"{file}: {problem}", err=True)
        if not problems:
            typer.echo(f"{file}: accepted")
    raise typer.Exit(code)


def _problems(manifests: list[Manifest], local: bool, profile: TuningProfile | None) -> list[str]:
    """What is wrong with a file's objects, a line of text for each; empty where the API server would take them."""
    known = [manifest for manifest in manifests if manifest.get("kind") in (KIND, PROFILE_KIND)]
    if not known:
        kinds = ", ".join(sorted({str(manifest.get("kind")) for manifest in manifests})) or "nothing"
        return [f"holds {kinds}; what is checked has kind: {KIND} or {PROFILE_KIND}"]
    return [problem for each in known for problem in _problems_of(each, local, profile)]


def _problems_of(manifest: Manifest, local: bool, profile: TuningProfile | None) -> list[str]:
    """What is wrong with a job or a profile."""
    try:
        if manifest.get("kind") == PROFILE_KIND:
            parse_profile(manifest)
            return []
        parsed = parse_job(manifest, local=local)
        if profile is not None:
            under(parsed, profile, local=local)
    except ValidationError as error:
        return explain(error, manifest)
    except ProfileError as error:
        return str(error).splitlines()
    return []


app.command("plan")(plan)
app.command("local")(run_here)
app.command("chat")(chat)
app.command("compare")(compare)
app.command("measure")(measure)
app.command("submit")(submit)
app.command("list")(list_jobs)
app.command("status")(show_status)
app.command("logs")(logs)
for command in (suspend, resume, retry, cancel):
    app.command(command.__name__)(command)
app.command("explain")(explain_reason)


def _operator_help() -> str:
    """The settings with their defaults, as the operator reads them."""
    lines = (f"- **{name}**: {words}{f' ({default})' if default else ''}" for name, default, words in variables())
    return "\n\n".join(
        (
            "Run the operator. Its settings are variables of the environment.",
            "The cluster is that of KUBECONFIG, or the one around its pod. In brackets what holds where a variable is not set:",
            "\n".join(lines),
        )
    )


@app.command("operator", help=_operator_help())
def operator() -> None:
    """Run the operator; the help lists its settings."""
    run_operator()


def main() -> None:
    """Entry of the console scripts `finetune` and `kubectl-finetune`."""
    app()
