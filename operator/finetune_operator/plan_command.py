"""`finetune plan`: what a job would take, from its manifest and the model's config.json, without a GPU and without a cluster."""

import json
import os
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from finetune_api import KIND
from finetune_api.architecture import Config, UnknownArchitectureError, architecture_of
from finetune_api.estimate import USABLE_SHARE
from finetune_api.gpus import GPUS, Gpu, gpu_of
from finetune_api.planning import DEFAULT_UTILISATION, Counted, Given, device_of, holds_teacher, plan_of, sizes_of
from finetune_api.status import Plan
from finetune_api.v1alpha1 import Spec, parse_job
from finetune_operator.budget import SECONDS_PER_HOUR
from finetune_operator.manifest import ManifestError, UnreadableError, exit_code, explain, read_bytes, read_file
from finetune_operator.profile_file import ProfileError, read_profile, under

GIB = 2**30
MIB = 2**20
HUB = "https://huggingface.co"
HUB_SECONDS = 30.0
LARGEST_CONFIG = 1 << 20
_REFUSED = (401, 403)
PARTS = {
    "weights": "weights",
    "method": "what the method adds",
    "gradients": "gradients",
    "optimizer": "AdamW's moments",
    "activations": "activations",
    "logits": "logits",
    "teacher": "teacher",
}


class PlanError(Exception):
    """Why there is no plan, for people."""


def plan(  # noqa: PLR0913, PLR0917 - one argument for each option
    job: Annotated[Path, typer.Argument(help="Manifest of the job.", metavar="JOB.yaml")],
    model_config: Annotated[
        Path | None, typer.Option("--model-config", help="The model's config.json, or its folder; else it is read from model.source.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help=f"GPU to plan for: {', '.join(GPUS)}.", metavar="NAME")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", help="Its memory, where it is another one.", metavar="GIB")] = None,
    peak_tflops: Annotated[
        float | None, typer.Option("--peak-tflops", help="Its dense peak in the training's format.", metavar="TFLOPS")
    ] = None,
    utilisation: Annotated[
        float, typer.Option("--utilisation", min=0.01, max=1.0, help="Share of the peak that the training is taken to reach.")
    ] = DEFAULT_UTILISATION,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Tokens of the training examples, for steps and hours.")] = None,
    examples: Annotated[int | None, typer.Option("--examples", min=1, help="Training examples; needed where packing is off.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="The TuningProfile that the job runs under: plan what the platform would run.", metavar="FILE"),
    ] = None,
    output: Annotated[Literal["table", "json", "yaml"], typer.Option("--output", "-o", help="Form of the answer.")] = "table",
) -> None:
    """Tell what a job would take: memory of each GPU by parts, micro-batch, steps, hours.

    Needs no GPU: memory and time are estimated from the model's config.json. Hours are those of the training steps alone, at
    --utilisation of the GPU's peak. A job with spec.planOnly counts its data, too. Exit codes: 0 planned, 1 the training does not
    fit, the job exceeds its profile, or there is no plan; 2 a file cannot be read.
    """
    try:
        spec = _spec(job, profile)
        known, data = _gpu(spec, gpu, gpu_memory, peak_tflops), _counted(spec, tokens, examples)
        found = plan_for(spec, job.parent, model_config, Given(device_of(spec, known), data, utilisation=utilisation))
    except PlanError as error:
        typer.echo(f"finetune: {error}", err=True)
        raise typer.Exit(exit_code(error)) from None
    _print(found, spec, output, utilisation)
    raise typer.Exit(1 if found.fits is False else 0)


def plan_for(spec: Spec, folder: Path, model_config: Path | None, given: Given) -> Plan:
    """The plan of a job whose manifest is in a folder. Raises PlanError."""
    try:
        model = sizes_of(architecture_of(_config(spec.model.source, spec.model.revision, folder, model_config)), spec)
        teacher = spec.teacher if holds_teacher(spec) else None
        beside = architecture_of(_config(teacher.source, teacher.revision, folder, None)).parameters if teacher and teacher.source else 0
    except UnknownArchitectureError as error:
        raise PlanError(str(error)) from error
    return plan_of(spec, model, replace(given, teacher=beside))


def _spec(file: Path, profile: Path | None) -> Spec:
    """The spec that runs: the job's own with what the profile gives and bounds. Raises PlanError."""
    try:
        manifests = [each for each in read_file(file) if each.get("kind") == KIND]
        if len(manifests) != 1:
            raise PlanError(f"{file}: holds {len(manifests)} objects of kind {KIND}; a plan is of one")
    except ManifestError as error:
        raise PlanError(f"{file}: {error}") from error
    try:
        offer = read_profile(profile) if profile else None
    except ProfileError as error:
        raise PlanError("; ".join(str(error).splitlines())) from error
    try:
        return under(parse_job(manifests[0], local=True), offer, local=True).spec
    except ValidationError as error:
        raise PlanError(f"{file}: {'; '.join(explain(error, manifests[0]))}") from error
    except ProfileError as error:
        raise PlanError(f"{file}: {'; '.join(str(error).splitlines())}") from error


def _gpu(spec: Spec, name: str | None, memory: float | None, teraflops: float | None) -> Gpu | None:
    """The GPU to plan for: the named one, else the one that compute.nodeSelector names, with the figures that are given."""
    if name is not None and name not in GPUS:
        raise PlanError(f"--gpu {name} is not known; there are {', '.join(GPUS)}. Give --gpu-memory and --peak-tflops for another one")
    known = GPUS[name] if name else gpu_of(spec.compute.node_selector)
    if memory is None and teraflops is None:
        return known
    if known is None:
        if memory is None:
            raise PlanError("--peak-tflops alone names no GPU: give --gpu-memory, too, or --gpu")
        return Gpu("given", int(memory * GIB), teraflops or 0.0)
    return replace(known, memory=int(memory * GIB) if memory else known.memory, teraflops=teraflops or known.teraflops)


def _counted(spec: Spec, tokens: int | None, examples: int | None) -> Counted | None:
    """The training examples, where their tokens are given; packed rows are taken to be full."""
    if tokens is None:
        return None
    if spec.training.packing:
        return Counted(tokens, -(-tokens // spec.training.max_sequence_length))
    if examples is None:
        raise PlanError("training.packing is off, so each example is a sequence: give --examples, too")
    return Counted(tokens, examples)


def _config(source: str, revision: str | None, folder: Path, given: Path | None) -> Config:
    """A model's config.json: the given one, that of a local folder, or the hub's. Raises PlanError."""
    if given is not None:
        return _read(given / "config.json" if given.is_dir() else given)
    if source.startswith("file://"):
        return _read(folder / source.removeprefix("file://") / "config.json")
    if source.startswith("hf://"):
        return _from_hub(source.removeprefix("hf://"), revision or "main")
    raise PlanError(f"{source} cannot be read from here: give its config.json with --model-config, or apply the job with planOnly: true")


def _read(path: Path) -> Config:
    try:
        return _parsed(read_bytes(path), str(path))
    except UnreadableError as error:
        raise PlanError(f"{path}: {error}") from error


def _from_hub(name: str, revision: str) -> Config:
    """config.json of a hub model; HF_ENDPOINT and HF_TOKEN are those of the hub's own client."""
    url = f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{name}/resolve/{revision}/config.json"
    token = os.environ.get("HF_TOKEN")
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310 - the user's own hub
    try:
        with urllib.request.urlopen(request, timeout=HUB_SECONDS) as answer:  # noqa: S310
            return _parsed(answer.read(LARGEST_CONFIG), url)
    except (urllib.error.URLError, OSError, ValueError) as error:
        gated = isinstance(error, urllib.error.HTTPError) and error.code in _REFUSED
        first = "set HF_TOKEN where the model is gated, or " if gated else ""
        raise PlanError(f"{url} cannot be fetched: {_why(error)}; {first}give the model's config.json with --model-config") from error


def _why(error: Exception) -> str:
    """What went wrong with a request, without the names of Python's errors around it."""
    cause = error.reason if type(error) is urllib.error.URLError else error
    return str(getattr(cause, "strerror", None) or cause)


def _parsed(content: bytes, where: str) -> Config:
    try:
        config: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{where} is not JSON") from error
    if not isinstance(config, dict):
        raise PlanError(f"{where} is not a JSON object")
    return config


def _print(found: Plan, spec: Spec, output: str, utilisation: float) -> None:
    if output == "json":
        typer.echo(json.dumps(found.to_json(), indent=2))
    elif output == "yaml":
        typer.echo(yaml.safe_dump(found.to_json(), sort_keys=False), nl=False)
    else:
        console = Console()
        console.print(_table(found))
        for line in (*_lines(found, utilisation), *_stopped(found, spec)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _unit(found: Plan) -> tuple[str, float]:
    """The unit that a plan's memory is told in, and its bytes: small models would be all zeros in GiB."""
    return ("GiB", GIB) if found.memory_per_gpu.total >= GIB else ("MiB", MIB)


def _table(found: Plan) -> Table:
    name_of_unit, unit = _unit(found)
    table = Table("MEMORY OF A PROCESS", name_of_unit, box=None, header_style="bold")
    table.columns[1].justify = "right"
    for name, words in PARTS.items():
        if size := getattr(found.memory_per_gpu, name):
            table.add_row(words, f"{size / unit:.2f}")
    table.add_row("in all, at its peak", f"{found.memory_per_gpu.total / unit:.2f}", style="bold")
    return table


def _lines(found: Plan, utilisation: float) -> list[str]:
    """What is to be said beside the table."""
    processes = f"{found.processes} process{'es' if found.processes > 1 else ''} ({found.strategy})"
    recomputed = "recomputed" if found.gradient_checkpointing else "kept"
    name_of_unit, unit = _unit(found)
    lines = [
        f"{found.parameters:,} parameters, {found.trained_parameters:,} of them trained, on {processes}",
        f"micro-batches of {found.micro_batch_size} sequences, activations {recomputed}; "
        f"the least that it runs in is {found.least_memory_per_gpu / unit:.2f} {name_of_unit}",
    ]
    if found.gpu_memory is not None:
        usable, verdict = USABLE_SHARE * found.gpu_memory / GIB, "fits" if found.fits else "does not fit"
        lines.append(f"{verdict} into {found.gpu}: {usable:.1f} GiB of {found.gpu_memory / GIB:.1f} are usable")
    if found.steps is not None:
        lines.append(f"{found.steps:,} steps of {found.tokens_per_epoch:,} tokens an epoch, {found.training_flops:.3g} operations")
    if found.hours is not None:
        lines.append(
            f"about {found.hours:.3g} hours and {found.gpu_hours:.3g} GPU-hours of training steps, at {utilisation:.0%} of the GPU's peak: "
            "an estimate, without waiting, measuring and publishing"
        )
    return lines


def _stopped(found: Plan, spec: Spec) -> list[str]:
    """Limits, the job's own or its profile's, that such a training comes to before its end."""
    budget, seconds = spec.max_gpu_hours, spec.active_deadline_seconds
    lines = []
    if budget is not None and found.gpu_hours is not None and found.gpu_hours > budget:
        lines.append(f"maxGpuHours ({budget:g}) is less than that: the job would be suspended before it ends")
    if seconds is not None and found.hours is not None and found.hours * SECONDS_PER_HOUR > seconds:
        lines.append(f"activeDeadlineSeconds ({seconds}) is less than that: the job would fail before it ends")
    return lines
