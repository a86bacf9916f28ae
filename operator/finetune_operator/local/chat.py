"""The command `finetune chat`: the base and the tuned model answer the same prompts side by side, in a process of the trainer's.

Of a job it needs what `finetune local` has left: the status beside the manifest, and the state folder with its claims.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_api import API_VERSION, KIND
from finetune_operator.local.inputs import with_absolute_files
from finetune_operator.local.state import JobFile, StateError
from finetune_operator.manifest import ManifestError, read_file

_WAYS = "name a JOB.yaml, or --base with --adapter or --model"


def chat(  # noqa: PLR0913, PLR0917 - one argument for each option
    job: Annotated[
        Path | None, typer.Argument(metavar="[JOB.yaml]", help="Manifest of a job that `finetune local` runs or has run.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="FOLDER|NAME", help="Base model: a folder, or owner/name on the hub.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="FOLDER", help="An adapter for that base model.")] = None,
    model: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A tuned model, of the artifact model or merged.")] = None,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to ask; more than once if you like. Default: what you type.")
    ] = [],  # noqa: B006 - typer copies it
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Ask without the chat template, as for data of prompts and completions.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    state: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder that the job ran in; default: .finetune beside it.")] = None,
) -> None:
    """Ask the base and the tuned model the same, and show their answers side by side.

    A job's tuned model is what it has published; before that what waits or is held back, and before that its newest checkpoint.
    Exit codes: 0 answered, 1 a model cannot be asked, 2 called wrongly.
    """
    options = [*_option("--system", system), *_option("--tokens", str(tokens)), *(["--plain"] if plain else [])]
    options += [word for each in prompt for word in ("--prompt", each)]
    if job is not None and not (base or adapter or model):
        with tempfile.TemporaryDirectory(prefix="finetune-chat-") as folder:
            file = Path(folder) / "job.json"
            try:
                file.write_text(json.dumps(_stored(job)), encoding="utf-8")
            except StateError as error:
                typer.echo(f"finetune: {error}", err=True)
                raise typer.Exit(2) from None
            volumes = (state or job.parent / ".finetune").resolve()
            raise typer.Exit(_run(["--job", str(file), "--volumes", str(volumes), *options]))
    if job is not None or base is None or (adapter is None) == (model is None):
        raise typer.BadParameter(_WAYS)
    tuned = adapter or model
    if tuned is not None and not tuned.is_dir():
        raise typer.BadParameter(f"there is no folder {tuned}", param_hint="--adapter" if adapter else "--model")
    kind = ["--adapter" if adapter else "--model", str(tuned)]
    raise typer.Exit(_run(["--base", base, *kind, *options]))


def _option(name: str, value: str | None) -> list[str]:
    return [] if value is None else [name, value]


def _stored(path: Path) -> dict[str, Any]:
    """The job of a manifest as its run has stored it. Raises StateError where it has not run."""
    try:
        manifests = read_file(path)
    except ManifestError as error:
        raise StateError(f"{path}: {error}") from None
    jobs = [manifest for manifest in manifests if manifest.get("kind") == KIND]
    if len(jobs) != 1:
        raise StateError(f"{path}: holds {len(jobs)} objects of kind {KIND}; chat takes one")
    own = jobs[0].get("metadata")
    name = own.get("name") if isinstance(own, dict) else None
    if not name:
        raise StateError(f"{path}: metadata.name: is required")
    stored = JobFile(path.parent / f"{name}.status.yaml").load()
    if stored is None:
        raise StateError(f"{name} has not run here: `finetune local {path}` runs it")
    meta = {key: stored["metadata"][key] for key in ("name", "namespace", "uid") if key in stored["metadata"]}
    spec = with_absolute_files(stored["spec"], path.parent.resolve())
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec, "status": stored.get("status") or {}}


def _run(arguments: Sequence[str]) -> int:
    """Run the trainer's side in this terminal: it reads what is typed and shows what is answered. Returns its exit code."""
    command = [sys.executable, "-m", "finetune_trainer", "chat", *arguments]
    variables = {"HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(command, env={**os.environ, **variables})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it is the other process's too, which ends by it
            continue
