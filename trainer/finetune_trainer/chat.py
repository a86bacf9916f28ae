"""`python -m finetune_trainer chat`: the base and the tuned model answer the same prompts, side by side, on this machine.

The tuned model of a job is what it has published; before that, what waits to be, or was not let through by a gate; before that, its newest
checkpoint. That of an adapter's or a model's folder is what stands there.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_api.fields import LOCAL_RUN
from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, Method, ModelSource, parse_job
from finetune_trainer import checkpoint
from finetune_trainer.attention import choose_layout
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.evaluation.markdown import HELD
from finetune_trainer.generation import Speaker, Voice
from finetune_trainer.keeping import CHECKPOINTS
from finetune_trainer.manifest import read_manifest
from finetune_trainer.model import CausalModel, head_scale, load_model, load_tokenizer, load_transformer, longest_example, precision_for
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.optimisation import restore_parameters
from finetune_trainer.published import Published
from finetune_trainer.quantization import quantization_config
from finetune_trainer.result import RESULT
from finetune_trainer.sources import Mounts, resolve_storage
from finetune_trainer.storage import Storage, storage_at

Say = Callable[[str], str]
"""From a prompt to an answer."""
KINDS = ("adapter", "model", "merged")


def chat(arguments: Sequence[str], console: Console | None = None, lines: Iterable[str] | None = None) -> int:
    """Answer the prompts of the command line, or of `lines` (standard input) where it has none. Returns the exit code."""
    asked = _parser().parse_args(arguments)
    console = console or Console()
    try:
        with tempfile.TemporaryDirectory() as cache:
            base, tuned, name = _voices(asked, Path(cache))
            for prompt in asked.prompt or _typed(console, sys.stdin if lines is None else lines):
                _show(console, prompt, ("base", base(prompt)), (name, tuned(prompt)))
    except JobError as error:
        Console(stderr=True, soft_wrap=True).print(f"{error.reason}: {error.message}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune chat", description="The base and the tuned model answer side by side.")
    parser.add_argument("--job", type=Path, help="a job with its status, in JSON")
    parser.add_argument("--volumes", type=Path, default=Path(), help="folder with claims, configmaps and secrets")
    parser.add_argument("--base", help="base model: a folder, or owner/name on the hub")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter")
    parser.add_argument("--model", type=Path, help="folder of a tuned model")
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--system")
    parser.add_argument("--plain", action="store_true", help="leave the chat template out")
    parser.add_argument("--tokens", type=int, default=256)
    return parser


def _voices(asked: argparse.Namespace, cache: Path) -> tuple[Say, Say, str]:
    """How to ask the base and the tuned model, and what the latter is called. Raises JobError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mounts = Mounts(asked.volumes, local=True)
    job = parse_job(json.loads(asked.job.read_text(encoding="utf-8")), local=True) if asked.job else None
    source = job.spec.model if job is not None else ModelSource.model_validate({"source": _uri(asked.base)}, context=LOCAL_RUN)
    revision = _resolved_revision(asked.job) if asked.job else None
    files = fetch_model(source, mounts, cache, weights=True, revision=revision)
    base = _loaded(files, device, source.quantization)
    if job is not None:
        name, found = _of_job(job, mounts)
        if isinstance(found, int):
            return _say(base, files, asked), _say(_at_step(files, job, storage_of(job, mounts), found, device), files, asked), name
        adapter, model = (found, None) if (found / "adapter_config.json").exists() else (None, found)
    else:
        adapter, model = asked.adapter, asked.model
        name = str(adapter or model)
    if adapter is not None:
        tuned = _with_adapter(base, adapter)
        return _say(tuned, files, asked, tuned=False), _say(tuned, files, asked), name
    whole = fetch_model(ModelSource.model_validate({"source": _uri(str(model))}, context=LOCAL_RUN), mounts, cache, weights=True)
    return _say(base, files, asked), _say(_loaded(whole, device), whole, asked), name


def _resolved_revision(job: Path) -> str | None:
    """The revision of the base model that the job has worked with, as its status has it."""
    resolved: dict[str, Any] = (json.loads(job.read_text(encoding="utf-8")).get("status") or {}).get("resolved") or {}
    return resolved.get("modelRevision")


def _uri(place: str) -> str:
    """A folder, or a name on the hub, as a URI."""
    if "://" in place:
        return place
    return f"file://{Path(place).resolve()}" if Path(place).exists() else f"hf://{place}"


def storage_of(job: FineTuneJob, mounts: Mounts) -> Storage:
    """output.storage."""
    return storage_at(resolve_storage(job.spec.output, mounts))


def _of_job(job: FineTuneJob, mounts: Mounts) -> tuple[str, Path | int]:
    """What is the job's tuned model, in words, and its folder, or the step of its newest checkpoint. Raises JobError."""
    storage = storage_of(job, mounts)
    own = storage.at(f".finetune/{job.metadata.uid}")
    if storage.is_local:
        for words, place in (("published", storage), ("not published", own.at(RESULT)), ("held back", own.at(HELD))):
            for kind in KINDS:
                folder = Path(place.location(kind).path)
                if _is_there(place, kind, job, published=place is storage) and folder.is_dir():
                    return f"tuned ({words})", folder
    steps = sorted(name for name in own.folders(CHECKPOINTS) if read_manifest(own.at(CHECKPOINTS), name) is not None)
    if not steps:
        problem = f"job {job.metadata.name} has nothing tuned yet: no artifact, and no checkpoint in {own.locate(CHECKPOINTS)}"
        raise JobError(Reason.MODEL_NOT_FOUND, f"{problem}; ask again after its first checkpoint")
    step = int(steps[-1].rpartition("-")[2])
    return f"tuned (checkpoint of step {step})", step


def _is_there(place: Storage, kind: str, job: FineTuneJob, *, published: bool) -> bool:
    """Whether an artifact is there, and the job's own: several jobs may publish to one place, one after the other."""
    if not published:
        return place.exists(kind)
    manifest = read_manifest(place, kind)
    return manifest is not None and (manifest.get("job") or {}).get("uid") == job.metadata.uid


def _loaded(files: ModelFiles, device: torch.device, quantization: str = "none") -> CausalModel:
    precision = precision_for("auto", device)
    config = quantization_config(quantization, precision)
    transformer = load_transformer(files, precision, device, config)
    layout = choose_layout(transformer)
    scale = head_scale(transformer, layout)
    return CausalModel(transformer.eval(), transformer, layout, scale, precision, device, tuned=False)


def _with_adapter(base: CausalModel, folder: Path) -> CausalModel:
    """The base model with a published adapter around it. Raises JobError (ModelInvalid)."""
    module = Published(folder).apply(base.transformer, seed=0)
    return replace(base, module=module.to(base.device).eval(), tuned=True)


def _at_step(files: ModelFiles, job: FineTuneJob, storage: Storage, step: int, device: torch.device) -> CausalModel:
    """The model as a checkpoint has it, with the method that it was made under. Raises JobError."""
    place = storage.at(f".finetune/{job.metadata.uid}").at(CHECKPOINTS)
    manifest = read_manifest(place, checkpoint.name_of(step))
    config = manifest["config"] if manifest is not None else {}
    if "method" in config:  # a search may have found other values than the manifest has
        method = Method.model_validate_json(json.dumps(config["method"]))
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"method": method})})
    state = checkpoint.find(place, step, config)
    model = load_model(files, job, device)
    own = [(name, parameter) for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    with checkpoint.opened(place, state) as (parameters, _):
        # What an objective trains beside the model is there too, and is not asked.
        restore_parameters(own, {name: parameters[name] for name, _ in own if name in parameters})
    return model


def _say(model: CausalModel, files: ModelFiles, asked: argparse.Namespace, *, tuned: bool = True) -> Say:
    """How to ask a model; without what its method adds, where it is not to be `tuned`."""
    tokenizer = load_tokenizer(files)
    shown = model if tuned else replace(model, tuned=False)
    speaker = Speaker(Voice(shown, tokenizer, longest_example(files)))

    def say(prompt: str) -> str:
        turns = [{"role": "system", "content": asked.system}] if asked.system else []
        messages = (*turns, {"role": "user", "content": prompt})
        is_chat = bool(tokenizer.chat_template) and not asked.plain
        case = Case("0", "", messages=messages) if is_chat else Case("0", "", prompt=f"{asked.system or ''}{prompt}")
        with nullcontext() if tuned else model.untuned():
            (reply,) = speaker.replies([speaker.prompt(case)], asked.tokens)
        return "(the prompt leaves no room for an answer)" if reply.too_long else reply.text.strip()

    return say


def _typed(console: Console, lines: Iterable[str]) -> Iterator[str]:
    """The prompts that somebody types, a line each, until the end of the input."""
    console.print("Type a prompt, and Enter; Ctrl-D ends.", style="dim")
    for line in lines:
        if line.strip():
            yield line.rstrip("\n")


def _show(console: Console, prompt: str, *answers: tuple[str, str]) -> None:
    """One prompt with its answers beside each other. A model's words do not rule the terminal."""
    table = Table(title=Text(_plain(prompt)), title_justify="left", expand=True)
    for name, _ in answers:
        table.add_column(Text(_plain(name)), ratio=1)
    table.add_row(*(Text(_plain(text)) for _, text in answers))
    console.print(table)


def _plain(text: str) -> str:
    """A text without control characters, but for the ends of its lines."""
    return "".join(character for character in text.replace("\t", "    ") if character == "\n" or character.isprintable())


def main(arguments: Sequence[str]) -> int:
    """Entry of the role: quiet about what libraries say of each other."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    return chat(arguments)
