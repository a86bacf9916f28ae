"""The command `finetune measure`: one measuring run of what a job has published here, on demand."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_operator.local.command import pairs
from finetune_operator.local.inputs import Given
from finetune_operator.local.run import Options, run_local


def measure(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="Manifest of a job with spec.monitoring that `finetune local` has run.")],
    config_map: Annotated[
        list[str], typer.Option(metavar="NAME=FILE_OR_FOLDER", help="A ConfigMap of this file, or of the files of this folder.")
    ] = [],  # noqa: B006 - typer copies it
    state: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder that the job ran in; default: .finetune beside it.")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Print what the head writes.")] = False,
) -> None:
    """Measure a published model again, now: the suites of spec.monitoring on the data that their sources hold today.

    Exit codes: 0 it held, 1 it is degraded or could not be measured, 2 not started.
    """
    given = Given(config_maps=pairs("--config-map", config_map))
    raise typer.Exit(run_local(job, Options(state=state, given=given, logs=logs, measure=True)))
