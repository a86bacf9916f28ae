"""A teacher that is a model: checked on the head beside the student, fetched and loaded on the workers only where it is needed.

.finetune/cache/teacher/<key>/    what a teacher says of some data (see objectives/distillation/teacher_cache.py), for all jobs;
                                  removed as prepared data is where no job has begun with it for long
<prepared data>/teacher/          the same of a teacher behind an endpoint, which was asked while the data was prepared
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import DistillationObjective, FineTuneJob, ModelSource
from finetune_trainer.activations import with_activations
from finetune_trainer.attention import choose_layout
from finetune_trainer.data_cache import mark_used
from finetune_trainer.errors import JobError
from finetune_trainer.methods import method_for
from finetune_trainer.model import (
    CausalModel,
    head_scale,
    load_tokenizer,
    load_transformer,
    longest_example,
    precision_for,
    read_config,
)
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.objectives.distillation import needs_teacher, taking_of, teacher_cache
from finetune_trainer.sources import Mounts
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE = ".finetune/cache/teacher"
"""Folder in output.storage."""
BESIDE_DATA = "teacher"
"""Folder in prepared data that an endpoint's teacher has worked on."""
_FIELD = "objective.distillation.teacher"


def teacher_source(job: FineTuneJob) -> ModelSource | None:
    """The teacher's files, where the job has a teacher that is a model."""
    spec = job.spec.objective.distillation
    return spec.teacher.model_source() if spec is not None else None


@dataclass(frozen=True)
class CheckedTeacher:
    """What the head knows of the teacher."""

    source: str
    revision: str
    """The commit of a hub model, else a fingerprint of its files."""
    longest: int | None
    """Positions that it was made for, where it says so."""


def check_teacher(
    job: FineTuneJob, student: ModelFiles, tokenizer: "PreTrainedTokenizerBase", mounts: Mounts, cache: Path, revision: str | None
) -> CheckedTeacher | None:
    """Check on the head, without weights, that the job's teacher can teach this student; None where the job has no model as its teacher.

    `revision` is what an earlier attempt resolved.
    Raises JobError (TeacherUnavailable, ModelNotFound, ModelInvalid, AuthenticationFailed, SecretNotFound, InvalidSpec, ...).
    """
    spec, source = job.spec.objective.distillation, teacher_source(job)
    if spec is None or source is None:
        return None
    with _blamed():
        files = fetch_model(source, mounts, cache, weights=False, revision=revision)
        config = read_config(files)
        theirs = load_tokenizer(files)
        longest = longest_example(files)
    _check_vocabulary(tokenizer.get_vocab(), theirs.get_vocab(), job.spec.model.source, source.source)
    layers = tuple(each.get_text_config().num_hidden_layers for each in (read_config(student), config))
    _check_layers(spec, *layers, soft_prompt=method_for(job.spec.method).virtual_tokens > 0)
    return CheckedTeacher(source.source, files.revision, longest)


def _check_vocabulary(ours: dict[str, int], theirs: dict[str, int], student: str, teacher: str) -> None:
    """Raise JobError where a token of one model is not the same token of the other."""
    if ours == theirs:
        return
    token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    what = (
        f"{teacher} has another vocabulary than {student} ({len(theirs):,} and {len(ours):,} tokens; the first that differs is {token!r})"
    )
    raise JobError(
        Reason.INVALID_SPEC,
        f"{_FIELD}: {what}, so what they say of a token cannot be compared: take a teacher with the student's tokenizer, "
        "or serve this one and name it as teacher.endpoint, whose text any student can learn",
    )


def _check_layers(spec: DistillationObjective, student: int, teacher: int, *, soft_prompt: bool) -> None:
    """Raise JobError where the feature form names layers that are not there, or maps that cannot be compared."""
    form = spec.feature
    if form is None:
        return
    for number, pair in enumerate(form.layers):
        for whose, layer, count in (("student", pair.student, student), ("teacher", pair.teacher, teacher)):
            field = f"objective.distillation.feature.layers[{number}].{whose}"
            if not -count - 1 <= layer <= count:
                raise JobError(Reason.INVALID_SPEC, f"{field} is {layer}, and the {whose} has the layers 0 (embeddings) to {count}")
            if form.attention and layer in (0, -count - 1):
                raise JobError(Reason.INVALID_SPEC, f"{field} is the embeddings, which have no attention map: leave out feature.attention")
    if form.attention and soft_prompt:
        raise JobError(
            Reason.INVALID_SPEC,
            "objective.distillation.feature.attention: maps of a model with a soft prompt cannot be compared; leave it out, or use lora",
        )


def shortest_limit(student: int | None, teacher: CheckedTeacher | None) -> int | None:
    """The longest example that both models take; None where neither says."""
    limits = [limit for limit in (student, teacher.longest if teacher is not None else None) if limit is not None]
    return min(limits, default=None)


@contextmanager
def _blamed() -> Iterator[None]:
    """Errors of fetching and loading, said of the teacher.

    Storage that does not answer may do so later; a teacher that is not there, or no model, is no more of one then: that reason stays.
    """
    try:
        yield
    except JobError as error:
        reason = Reason.TEACHER_UNAVAILABLE if error.reason == Reason.STORAGE_UNAVAILABLE else error.reason
        raise JobError(reason, f"{_FIELD}: {error.message}") from error


@dataclass(frozen=True)
class Taught:
    """The student, and what it learns from: as the loop takes them."""

    student: CausalModel
    teacher: CausalModel | None = None
    kept: Storage | None = None


@dataclass(frozen=True)
class Place:
    """Where a worker finds things."""

    output: Storage
    """output.storage."""
    data: str
    """Folder of the prepared data in it."""
    digest: str
    """The data's."""
    mounts: Mounts
    cache: Path


def taught(
    job: FineTuneJob,
    student: CausalModel,
    revision: str | None,
    place: Place,
    worker: Worker,
    first_of_each_node: Callable[[Callable[[], ModelFiles]], ModelFiles],
) -> Taught:
    """The student with its teacher, loaded where it is needed. Every worker calls it.

    `revision` is what the head resolved. Raises JobError (TeacherUnavailable, ...).
    """
    spec, source = job.spec.objective.distillation, teacher_source(job)
    if spec is None:
        return Taught(student)
    if source is None:
        asked = spec.teacher.endpoint is not None and spec.teacher.endpoint.top_logprobs > 0
        return Taught(student, kept=place.output.at(f"{place.data}/{BESIDE_DATA}") if asked else None)

    kept, taking = None, taking_of(spec, student)
    if taking is not None:
        name = f"{CACHE}/{teacher_cache.key(_named(source, revision, job.metadata.namespace), place.digest, taking, student.precision)}"
        kept = place.output.at(name)
        if worker.leads:
            mark_used(place.output, name)
    complete = kept is not None and bool(worker.agree(int(worker.leads and teacher_cache.is_complete(kept))))
    if not needs_teacher(spec, kept=complete):
        return Taught(student, kept=kept)
    with _blamed():
        files = first_of_each_node(lambda: fetch_model(source, place.mounts, place.cache, weights=True, revision=revision))
        teacher = load_teacher(files, job, worker.device)
    attention = spec.feature is not None and spec.feature.attention
    student, teacher = _alike(student, teacher, attention=attention)
    student, _ = with_activations(student, job, worker)  # the teacher has taken memory since that was planned
    return Taught(student, teacher, kept)


def _named(source: ModelSource, revision: str | None, namespace: str) -> str:
    """What no other teacher is called, even if somebody wants one to be.

    A hub's commit says all of its files. What is known of files elsewhere (see `model_files`) leaves out the middle of large ones, so that
    another teacher can be made to look the same; but not in this place, which only those can write to whom this job's owner trusts.
    """
    if source.source.startswith("hf://"):
        return f"{source.source} {revision}"
    secret = source.secret_ref.name if source.secret_ref else None
    return f"{namespace} {source.source} {secret} {revision}"


def load_teacher(files: ModelFiles, job: FineTuneJob, device: torch.device) -> CausalModel:
    """The teacher in the computation's precision, without gradients, in evaluation mode. Raises JobError (ModelInvalid)."""
    precision = precision_for(job.spec.training.precision, device)
    transformer = load_transformer(files, precision, device)
    layout = choose_layout(transformer)
    scale = head_scale(transformer, layout)
    transformer.requires_grad_(False).eval()
    return CausalModel(transformer, transformer, layout, scale, precision, device, tuned=False)


def _alike(student: CausalModel, teacher: CausalModel, *, attention: bool) -> tuple[CausalModel, CausalModel]:
    """Both in one layout, so that one micro-batch is for both: padded where one needs it, or where attention maps are wanted."""
    if attention:
        return _padded(student, "eager"), _padded(teacher, "eager")
    if student.layout == teacher.layout:
        return student, teacher
    return _padded(student), _padded(teacher)


def _padded(model: CausalModel, implementation: str | None = None) -> CausalModel:
    """The model with padded rows, and an attention of transformers' own that takes them."""
    if implementation is None and model.layout == "padded":
        return model
    transformer = model.transformer
    try:
        transformer.set_attn_implementation(implementation or "sdpa")
    except ValueError:  # few models know no other
        transformer.set_attn_implementation("eager")
    return replace(model, layout="padded")
