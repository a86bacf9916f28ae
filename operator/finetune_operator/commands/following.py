"""Watching a job until it has ended: one place on a terminal, a line for each change elsewhere."""

import asyncio

from rich.console import Console

from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_operator.asking import absent
from finetune_operator.local.view import Lines, Screen, View
from finetune_operator.people import People
from finetune_operator.words import status_lines

POLL_SECONDS = 2.0


async def follow(cluster: People, namespace: str, name: str) -> Status:
    """Show where a job stands until it has ended; its last status. Ends the command where there is no such job, or no longer."""
    console = Console(soft_wrap=True)
    view: View = Screen(console, name) if console.is_terminal else Lines(console)
    try:
        while True:
            job = await cluster.job(namespace, name)
            if job is None:
                raise absent(name, namespace)
            status = Status.model_validate(job.get("status") or {})
            view.update(_plain(status))
            if status.finished:
                return status
            await asyncio.sleep(POLL_SECONDS)
    finally:
        view.close()


def told(status: Status) -> list[str]:
    """A status in lines, without anything that would rule the reader's terminal."""
    return [scrub(line) for line in status_lines(status)]


def _plain(status: Status) -> Status:
    return status.model_copy(update={"message": scrub(status.message)}) if status.message else status
