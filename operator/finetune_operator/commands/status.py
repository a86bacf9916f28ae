"""`finetune status JOB`: where a job stands, once or until it has ended."""

from typing import Annotated

import typer

from finetune_api.status import Status
from finetune_operator.asking import Context, JobName, Place, absent, ask, place_of
from finetune_operator.commands.following import follow, told
from finetune_operator.people import people

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it has ended; the exit code is 1 where it failed.")]


def show_status(name: JobName, namespace: Place = "", context: Context = "", watch: Watch = False) -> None:
    """Tell where a job stands, what it has achieved, and what to do where it failed."""
    where = place_of(namespace, context)

    async def read() -> Status:
        async with people(context) as cluster:
            if watch:
                return await follow(cluster, where, name)
            job = await cluster.job(where, name)
        if job is None:
            raise absent(name, where)
        return Status.model_validate(job.get("status") or {})

    status = ask(read())
    for line in told(status):
        typer.echo(line)
    if watch and status.phase == "Failed":
        raise typer.Exit(1)
