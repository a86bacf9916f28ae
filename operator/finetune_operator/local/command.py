"""The command `finetune local`: its options, in the words of the command line."""

from pathlib import Path
from typing import Annotated

import typer

from finetune_operator.local.inputs import Given
from finetune_operator.local.run import Options, run_local


def local(  # noqa: PLR0913, PLR0917 - one argument for each option
    job: Annotated[
        Path,
        typer.Argument(metavar="JOB.yaml", help="The manifest: one FineTuneJob, and beside it its ConfigMaps and Secrets if you like."),
    ],
    config_map: Annotated[
        list[str], typer.Option(metavar="NAME=FILE_OR_FOLDER", help="A ConfigMap of this file, or of the files of this folder.")
    ] = [],  # noqa: B006 - typer copies it
    claim: Annotated[
        list[str],
        typer.Option(metavar="NAME[/PATH]=FOLDER", help="The folder that stands for a PersistentVolumeClaim, or files put into it."),
    ] = [],  # noqa: B006
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The TuningProfile that the job runs under; only its image has no meaning here.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for claims, logs and pods; default: .finetune beside the manifest.")
    ] = None,
    workers_cpus: Annotated[
        int | None, typer.Option(min=1, help="CPUs for each worker; default: an equal share of this machine's.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Suspend the job after so many seconds (exit code 124).")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Print what the head writes.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget an earlier run of this job and begin anew.")] = False,
) -> None:
    """Run a job on this machine, without Kubernetes: the same stages and results, with processes in place of pods.

    Ctrl-C saves a checkpoint and suspends the job; the same command, without --fresh, goes on from there. The job with its status
    stands in NAME.status.yaml beside the manifest. Exit codes: 0 complete, 1 failed, 2 not started, 124 timeout, 130 Ctrl-C.
    """
    given = Given(config_maps=pairs("--config-map", config_map), claims=pairs("--claim", claim), profile=profile)
    options = Options(state=state, given=given, worker_cpus=workers_cpus, timeout=timeout, fresh=fresh, logs=logs)
    raise typer.Exit(run_local(job, options))


def pairs(option: str, values: list[str]) -> dict[str, Path]:
    """NAME=PATH, any number of times."""
    pairs = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise typer.BadParameter(f"{value!r} is not NAME=PATH", param_hint=option)
        pairs[name] = Path(path).expanduser()
    return pairs
