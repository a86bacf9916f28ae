"""What the commands of a person have in common when they ask a cluster."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from kubernetes.aio.config import ConfigException, list_kube_config_contexts

from finetune_api import KIND
from finetune_operator.cluster import connect
from finetune_operator.port import ApiError, JobKey

COMPLETION_SECONDS = 3.0
"""Longest wait for names while somebody holds the tabulator key."""

Place = Annotated[
    str, typer.Option("--namespace", "-n", help="Namespace of the job. Default: the context's.", metavar="NAME", show_default=False)
]
Context = Annotated[
    str, typer.Option("--context", help="Context of the kubeconfig. Default: the current one.", metavar="NAME", show_default=False)
]
Result = TypeVar("Result")

UNUSABLE = (ConfigException, yaml.YAMLError, FileNotFoundError, PermissionError, IsADirectoryError)
"""What reading a kubeconfig raises where it is absent or broken."""

logging.getLogger("kubernetes.aio.config.kube_config").setLevel(logging.ERROR)  # it warns of what `ask` says


def ask(call: Coroutine[Any, Any, Result]) -> Result:
    """The result of a call to the cluster, or an error in one line and exit code 1."""
    try:
        return asyncio.run(call)
    except UNUSABLE as error:
        typer.echo(f"finetune: {_without_cluster(error)}", err=True)
        raise typer.Exit(1) from None
    except ApiError as error:
        unknown = error.status == HTTPStatus.NOT_FOUND and error.reason != "NotFound"  # the kind, not an object
        typer.echo(f"finetune: {error}{'; this cluster knows no FineTuneJobs: install the operator in it' if unknown else ''}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _without_cluster(error: Exception) -> str:
    """Why there is no cluster to ask, and what to do."""
    named = os.environ.get("KUBECONFIG") or "~/.kube/config"
    if not any(Path(each).expanduser().is_file() for each in named.split(os.pathsep)):
        return f"there is no kubeconfig {named}: set KUBECONFIG to your cluster's (`finetune local` runs jobs without one)"
    return f"the kubeconfig {named} cannot be used: {error}"


def place_of(namespace: str, context: str) -> str:
    """The namespace that is meant: the one that is named, else that of the kubeconfig's context, else `default`."""
    if namespace:
        return namespace
    try:
        contexts, current = list_kube_config_contexts(config_file=os.environ.get("KUBECONFIG") or None)
    except (*UNUSABLE, OSError, TypeError, KeyError):
        return "default"  # there is no usable kubeconfig: what is asked next says so
    found = next((each for each in contexts if each["name"] == context), None) if context else current
    return str((found or {}).get("context", {}).get("namespace") or "default")


async def read_jobs(namespace: str, names: tuple[str, ...], context: str = "") -> list[dict[str, Any] | None]:
    """The jobs of these names, as the API server has them; None for one that is not there."""
    async with connect(context=context) as cluster:
        found = [await cluster.read(JobKey(namespace, name)) for name in names]
    return [job.job if job else None for job in found]


async def list_jobs(namespace: str | None, context: str = "") -> list[dict[str, Any]]:
    """The jobs of a namespace, or of all."""
    async with connect(context=context) as cluster:
        return await cluster.jobs(namespace)


def absent(name: str, namespace: str) -> typer.Exit:
    """Say that there is no such job. Returns what ends the command."""
    typer.echo(f"there is no {KIND} {name} in namespace {namespace}; `finetune list -A` shows all", err=True)
    return typer.Exit(1)


def job_names(context: typer.Context, incomplete: str) -> list[str]:
    """Names of jobs that begin so, for completion: none where the cluster cannot be asked."""
    given = context.params
    where, cluster = given.get("namespace") or "", given.get("context") or ""

    async def names() -> list[str]:
        async with asyncio.timeout(COMPLETION_SECONDS):
            return [str(job["metadata"]["name"]) for job in await list_jobs(place_of(where, cluster), cluster)]

    try:
        return [name for name in asyncio.run(names()) if name.startswith(incomplete)]
    except (ApiError, *UNUSABLE, TimeoutError, OSError):
        return []


JobName = Annotated[str, typer.Argument(help="Name of the job.", autocompletion=job_names, metavar="JOB")]
