"""`finetune suspend | resume | retry | cancel`: what is wanted of a job, as a change of its spec or its annotations."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import typer

from finetune_api import ANNOTATION_CANCEL, ANNOTATION_RETRY
from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_operator.asking import Context, JobName, Place, absent, ask, place_of
from finetune_operator.people import people

Change = Callable[[Status], dict[str, Any] | str]
"""The JSON merge patch for a job with this status, or why it cannot be."""


def suspend(name: JobName, namespace: Place = "", context: Context = "") -> None:
    """Take a job's pods away after a checkpoint; `finetune resume` goes on from there."""
    _steer(name, namespace, context, _while_it_lives({"spec": {"suspend": True}}), "is being suspended: its pods save a checkpoint and go")


def resume(name: JobName, namespace: Place = "", context: Context = "") -> None:
    """Go on with a suspended job, from its newest checkpoint."""
    _steer(name, namespace, context, _while_it_lives({"spec": {"suspend": False}}), "goes on from its newest checkpoint")


def retry(name: JobName, namespace: Place = "", context: Context = "") -> None:
    """Try a failed or canceled job again, from its newest checkpoint."""
    _steer(name, namespace, context, _again, "is tried again")


def cancel(name: JobName, namespace: Place = "", context: Context = "") -> None:
    """Give a job up: its pods save a checkpoint and go. `finetune retry` takes it up again."""
    _steer(name, namespace, context, _while_it_lives({"metadata": {"annotations": {ANNOTATION_CANCEL: "true"}}}), "is being canceled")


def _while_it_lives(patch: dict[str, Any]) -> Change:
    return lambda status: f"has ended ({status.phase})" if status.finished else patch


def _again(status: Status) -> dict[str, Any] | str:
    if not (status.finished and status.phase == "Failed"):
        return f"has not failed ({status.phase or 'not seen by an operator yet'}): there is nothing to retry"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"metadata": {"annotations": {ANNOTATION_RETRY: now, ANNOTATION_CANCEL: None}}}


def _steer(name: str, namespace: str, context: str, change: Change, done: str) -> None:
    where = place_of(namespace, context)

    async def steer() -> str | None:
        async with people(context) as cluster:
            job = await cluster.job(where, name)
            if job is None:
                raise absent(name, where)
            wanted = change(Status.model_validate(job.get("status") or {}))
            if isinstance(wanted, str):
                return wanted
            await cluster.change(where, name, wanted)
            return None

    refusal = ask(steer())
    if refusal:
        typer.echo(scrub(f"{name} {refusal}"), err=True)
        raise typer.Exit(1)
    typer.echo(f"{name} {done}")
