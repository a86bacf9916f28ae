"""What the commands of a person have in common when they ask a cluster."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import typer
from kubernetes.aio.config import ConfigException

from finetune_api import KIND
from finetune_operator.cluster import connect
from finetune_operator.port import ApiError, JobKey

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the job.", metavar="NAME")]
Result = TypeVar("Result")


def ask(call: Coroutine[Any, Any, Result]) -> Result:
    """The result of a call to the cluster, or an error in one line and exit code 1."""
    try:
        return asyncio.run(call)
    except (ApiError, ConfigException) as error:
        typer.echo(f"finetune: {error}", err=True)
        raise typer.Exit(1) from None


async def read_jobs(namespace: str, names: tuple[str, ...]) -> list[dict[str, Any] | None]:
    """The jobs of these names, as the API server has them; None for one that is not there."""
    async with connect() as cluster:
        found = [await cluster.read(JobKey(namespace, name)) for name in names]
    return [job.job if job else None for job in found]


def absent(name: str, namespace: str) -> typer.Exit:
    """Say that there is no such job. Returns what ends the command."""
    typer.echo(f"there is no {KIND} {name} in namespace {namespace}; `finetune list -A` shows all", err=True)
    return typer.Exit(1)
