"""`finetune logs JOB`: what the pods of a job's current attempt have printed, each line with the pod's role before it."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from finetune_api import LABEL_ATTEMPT
from finetune_api.scrub import scrub
from finetune_api.status import Status
from finetune_operator.asking import Context, JobName, Place, absent, ask, place_of
from finetune_operator.people import People, people
from finetune_operator.port import ApiError

Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on as more is printed, also in pods that come later, until the job has ended.")
]
Tail = Annotated[int, typer.Option("--tail", help="Lines of each pod to begin with; -1 is all.", min=-1)]

POLL_SECONDS = 2.0
_COLOURS = ("green", "yellow", "blue", "magenta", "cyan")


def logs(name: JobName, namespace: Place = "", context: Context = "", follow: Follow = False, tail: Tail = -1) -> None:
    """Print the logs of the pods of a job's current attempt: the head's and the workers'."""
    where = place_of(namespace, context)

    async def read() -> None:
        async with people(context) as cluster:
            show = _printer()
            job = await cluster.job(where, name)
            if job is None:
                raise absent(name, where)
            if follow:
                await _follow(cluster, where, name, tail, show)
                return
            for pod in await _pods(cluster, job):
                await _print(cluster, pod, tail, False, show)

    ask(read())


Show = Callable[[str, str], None]
"""Prints a line of a pod with this role."""


async def _pods(cluster: People, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of the job's current attempt that have begun to run, the head first."""
    attempt = str(Status.model_validate(job.get("status") or {}).attempt.number)
    pods = await cluster.pods(job["metadata"]["namespace"], job["metadata"]["name"])
    current = [pod for pod in pods if pod["metadata"]["labels"].get(LABEL_ATTEMPT) == attempt]
    return sorted((pod for pod in current if _has_begun(pod)), key=lambda pod: str(pod["metadata"]["name"]))


def _has_begun(pod: dict[str, Any]) -> bool:
    states = (container.get("state", {}) for container in pod.get("status", {}).get("containerStatuses") or ())
    return any("running" in state or "terminated" in state for state in states)


async def _follow(cluster: People, namespace: str, name: str, tail: int, show: Show) -> None:
    """Follow every pod of the current attempt, and of those after it, until the job has ended and nothing more comes."""
    reading: dict[str, asyncio.Task[None]] = {}
    while (job := await cluster.job(namespace, name)) is not None:
        for pod in await _pods(cluster, job):
            if (uid := str(pod["metadata"]["uid"])) not in reading:
                reading[uid] = asyncio.create_task(_print(cluster, pod, tail, True, show))
        if Status.model_validate(job.get("status") or {}).finished:
            break
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.gather(*reading.values())


async def _print(cluster: People, pod: dict[str, Any], tail: int, follow: bool, show: Show) -> None:
    meta = pod["metadata"]
    role = "-".join(str(meta["name"]).split("-")[-2:]) if "-worker-" in meta["name"] else "head"
    try:
        async for line in cluster.log(meta["namespace"], meta["name"], follow=follow, tail=tail):
            show(role, line)
    except ApiError as error:
        show(role, f"({error})")  # the pod, or its node, has gone; the others' logs can be read


def _printer() -> Show:
    """Prints a line with its pod's role, which has a colour of its own on a terminal."""
    console, colours = Console(soft_wrap=True, highlight=False), dict[str, str]()

    def show(role: str, line: str) -> None:
        colour = colours.setdefault(role, _COLOURS[len(colours) % len(_COLOURS)])
        console.print(Text.assemble((f"{role:<9}| ", colour), scrub(line)))

    return show
