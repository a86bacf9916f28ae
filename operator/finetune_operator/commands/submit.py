"""`finetune submit FILE`: the jobs of a manifest, checked here and applied server-side."""

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from finetune_api import KIND
from finetune_api.status import Status
from finetune_api.v1alpha1 import parse_job
from finetune_operator.asking import Context, Place, ask, place_of
from finetune_operator.commands.following import follow, told
from finetune_operator.manifest import Manifest, ManifestError, explain, read_file
from finetune_operator.people import people

File = Annotated[
    Path, typer.Argument(help="A manifest with one job or several; `-` reads standard input.", metavar="FILE", allow_dash=True)
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the jobs until they have ended; the exit code is 1 where one failed.")]


def submit(file: File, namespace: Place = "", context: Context = "", wait: Wait = False) -> None:
    """Apply the jobs of a manifest: make them, or change what may be changed of them."""
    jobs = _jobs(file)
    default = place_of(namespace, context)
    for job in jobs:
        told_of = job["metadata"].get("namespace")
        if namespace and told_of not in (None, namespace):
            raise _refused([f"{file}: {job['metadata']['name']} is for the namespace {told_of}, not {namespace}: leave one of them out"])

    async def apply() -> list[tuple[str, Status]]:
        ended = []
        async with people(context) as cluster:
            for job in jobs:
                where = job["metadata"].get("namespace") or default
                stored = await cluster.apply(where, job)
                new = stored["metadata"].get("generation") == 1 and not stored.get("status", {}).get("phase")
                typer.echo(f"{job['metadata']['name']} {'submitted' if new else 'applied'} in namespace {where}")
            for job in jobs if wait else ():
                name = job["metadata"]["name"]
                ended.append((name, await follow(cluster, job["metadata"].get("namespace") or default, name)))
        return ended

    failed = False
    for name, status in ask(apply()):
        typer.echo("\n".join((f"{name}:", *told(status))))
        failed |= status.phase == "Failed"
    if failed:
        raise typer.Exit(1)


def _jobs(file: Path) -> list[dict[str, Any]]:
    """The jobs of a file, each without what only an API server may say. Ends the command where one is wrong, or there is something else."""
    try:
        manifests = read_file(file)
    except ManifestError as error:
        raise _refused([f"{file}: {error}"]) from None
    others = sorted({str(manifest.get("kind")) for manifest in manifests} - {KIND})
    if others or not manifests:
        raise _refused([f"{file}: holds {', '.join(others) or 'nothing'}: only {KIND}s are submitted; use kubectl apply for the rest"])
    problems = [problem for manifest in manifests for problem in _problems(manifest)]
    if problems:
        raise _refused([f"{file}: {problem}" for problem in problems])
    return [{key: manifest[key] for key in ("apiVersion", "kind", "metadata", "spec")} for manifest in manifests]


def _problems(job: Manifest) -> list[str]:
    try:
        parse_job(job)
    except ValidationError as error:
        return explain(error, job)
    return []


def _refused(lines: list[str]) -> typer.Exit:
    typer.echo("\n".join(lines), err=True)
    return typer.Exit(1)
