"""The command line: `finetune operator | local | chat | measure | validate | list | status | compare | explain`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api import KIND
from finetune_api.profile import TuningProfile
from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_api.v1alpha1 import parse_job
from finetune_operator.__main__ import installed_version
from finetune_operator.__main__ import main as run_operator
from finetune_operator.asking import Namespace, absent, ask, read_jobs
from finetune_operator.cluster import connect
from finetune_operator.compare import compare
from finetune_operator.local.chat import chat
from finetune_operator.local.command import local as run_here
from finetune_operator.local.measure import measure
from finetune_operator.manifest import Manifest, ManifestError, explain, read_manifests
from finetune_operator.profile_file import ProfileError, read_profile, under
from finetune_operator.reason_command import explain as explain_reason
from finetune_operator.words import status_lines

app = typer.Typer(
    name="finetune",
    help="Tune language models: check manifests, run jobs on this machine, look at jobs in a cluster, run the operator.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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


@app.command("operator")
def operator() -> None:
    """Run the operator. Its settings are FINETUNE_* variables of the environment."""
    run_operator()


app.command("local")(run_here)
app.command("chat")(chat)
app.command("measure")(measure)
app.command("compare")(compare)
app.command("explain")(explain_reason)


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(help="Manifests; `-` reads standard input.", metavar="FILE...", allow_dash=True)],
    local: Annotated[bool, typer.Option("--local", help="Allow file:// sources, as `finetune local` does.")] = False,
    profile: Annotated[Path | None, typer.Option(metavar="FILE", help="A TuningProfile: check that the jobs keep within it, too.")] = None,
) -> None:
    """Check manifests as the API server would, without one. Exit code 1 where one is refused."""
    refused = 0
    try:
        offer = read_profile(profile) if profile else None
    except ProfileError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for file in files:
        problems = _problems(file, local, offer)
        refused += bool(problems)
        for problem in problems:
            typer.echo(f"{file}: {problem}", err=True)
        if not problems:
            typer.echo(f"{file}: accepted")
    raise typer.Exit(1 if refused else 0)


def _problems(file: Path, local: bool, profile: TuningProfile | None) -> list[str]:
    """What is wrong with a file, a line of text for each; empty where the API server would take it."""
    try:
        manifests = read_manifests(typer.get_text_stream("stdin").read() if str(file) == "-" else file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        return [f"cannot be read: {error}"]
    except ManifestError as error:
        return [str(error)]
    jobs = [manifest for manifest in manifests if manifest.get("kind") == KIND]
    if not jobs:
        kinds = ", ".join(sorted({str(manifest.get("kind")) for manifest in manifests})) or "nothing"
        return [f"holds no {KIND} but {kinds}; set kind: {KIND}"]
    return [problem for job in jobs for problem in _job_problems(job, local, profile)]


def _job_problems(job: Manifest, local: bool, profile: TuningProfile | None) -> list[str]:
    try:
        parsed = parse_job(job, local=local)
        if profile is not None:
            under(parsed, profile, local=local)
    except ValidationError as error:
        return explain(error, job)
    except ProfileError as error:
        return str(error).splitlines()
    return []


@app.command("list")
def list_jobs(
    namespace: Namespace = "default",
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of every namespace.")] = False,
) -> None:
    """List the jobs of the cluster that KUBECONFIG names."""

    async def read() -> list[dict[str, Any]]:
        async with connect() as cluster:
            return await cluster.jobs(None if everywhere else namespace)

    table = Table("NAMESPACE", "NAME", "PHASE", "PROGRESS", "LOSS", "GATES", "ATTEMPT", "MESSAGE", box=None, header_style="bold")
    for job in ask(read()):
        status = Status.model_validate(job.get("status") or {})
        table.add_row(
            job["metadata"]["namespace"],
            job["metadata"]["name"],
            status.phase or "",
            f"{status.progress.percent}%" if status.progress else "",
            next((f"{metric.value:.4g}" for metric in status.metrics if metric.name == "train/loss"), ""),
            gates.status if (gates := status.condition("GatesPassed")) else "",
            str(status.attempt.number),
            Text(scrub(status.message or "")),  # a tenant's words: as a str they would be markup, and broken markup ends the command
        )
    Console().print(table)


@app.command("status")
def show_status(name: Annotated[str, typer.Argument(help="Name of the job.")], namespace: Namespace = "default") -> None:
    """Tell where a job stands, what it has achieved, and what to do where it failed."""
    (job,) = ask(read_jobs(namespace, (name,)))
    if job is None:
        raise absent(name, namespace)
    for line in status_lines(Status.model_validate(job.get("status") or {})):
        typer.echo(scrub(line))  # the names and words of a tenant's pod do not rule the reader's terminal


def main() -> None:
    """Entry of the console script `finetune`."""
    app()
