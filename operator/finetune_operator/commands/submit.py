"""`finetune submit FILE`: the jobs of a manifest, checked here and applied server-side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError

from finetune_api import API_VERSION, KIND
from finetune_api.status import Status
from finetune_api.v1alpha1 import parse_job
from finetune_operator.asking import Context, Place, ask, place_of
from finetune_operator.commands.following import follow, told
from finetune_operator.manifest import EXIT_REFUSED, Manifest, ManifestError, exit_code, explain, read_file
from finetune_operator.people import people

File = Annotated[
    Path, typer.Argument(help="A manifest with one job or several; `-` reads standard input.", metavar="FILE", allow_dash=True)
]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the jobs until they have ended; the exit code is 1 where one failed.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Ask the API server whether it would take the jobs, and print them as it would store them.")
]


def submit(file: File, namespace: Place = "", context: Context = "", wait: Wait = False, dry_run: DryRun = False) -> None:
    """Apply the jobs of a manifest: make them, or change what may be changed of them."""
    if wait and dry_run:
        raise typer.BadParameter("with --dry-run there is nothing to wait for", param_hint="--wait")
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
                stored = await cluster.apply(where, job, dry_run=dry_run)
                typer.echo(_would(where, stored) if dry_run else _done(where, stored))
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


def _done(where: str, stored: Mapping[str, Any]) -> str:
    new = stored["metadata"].get("generation") == 1 and not stored.get("status", {}).get("phase")
    return f"{stored['metadata']['name']} {'submitted' if new else 'applied'} in namespace {where}"


def _would(where: str, stored: Mapping[str, Any]) -> str:
    """What the API server would store, with every default, as a manifest below a comment. What is not stored yet has no version."""
    done = "applied" if stored["metadata"].get("resourceVersion") else "submitted"
    verdict = f"{stored['metadata']['name']} would be {done} in namespace {where}"
    meta = {name: stored["metadata"][name] for name in ("name", "namespace", "labels", "annotations") if name in stored["metadata"]}
    text = yaml.safe_dump({"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": stored.get("spec")}, sort_keys=False)
    return f"---\n# {verdict} (nothing is stored)\n{text.rstrip()}"


def _jobs(file: Path) -> list[dict[str, Any]]:
    """The jobs of a file, each without what only an API server may say. Ends the command where one is wrong, or there is something else."""
    try:
        manifests = read_file(file)
    except ManifestError as error:
        raise _refused([f"{file}: {error}"], exit_code(error)) from None
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


def _refused(lines: list[str], code: int = EXIT_REFUSED) -> typer.Exit:
    typer.echo("\n".join(lines), err=True)
    return typer.Exit(code)
