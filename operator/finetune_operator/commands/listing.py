"""`finetune list`: the jobs of a namespace, or of all, a line for each."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_operator.asking import Context, Place, ask, place_of
from finetune_operator.asking import list_jobs as read

Everywhere = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Jobs of every namespace.")]


def list_jobs(namespace: Place = "", context: Context = "", everywhere: Everywhere = False) -> None:
    """List the jobs of the cluster that KUBECONFIG names."""
    table = Table("NAMESPACE", "NAME", "PHASE", "PROGRESS", "LOSS", "GATES", "ATTEMPT", "MESSAGE", box=None, header_style="bold")
    for job in ask(read(None if everywhere else place_of(namespace, context), context)):
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
