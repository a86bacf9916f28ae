"""The first stage: storage, model and data are checked, and the tokenised data written, so that a fault costs no worker."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_api.preparation import Generator as GeneratorSpec
from finetune_api.status import DataSummary, Resolved
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.crew import Crew
from finetune_trainer.export import check_free
from finetune_trainer.manifest import digest_of
from finetune_trainer.methods.advice import advice, strategy_advice
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.ray_cluster import gpus_of, processes_of
from finetune_trainer.result import RESULT
from finetune_trainer.search_space import config_of, roomiest
from finetune_trainer.storage import MANIFEST, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune_trainer.data.inputs import Input
    from finetune_trainer.made_data import Writer
    from finetune_trainer.model import Inspected
    from finetune_trainer.teacher import CheckedTeacher

PREPARED_FACTS = "prepared.json"


@dataclass(frozen=True)
class _Models:
    """The models of a job, as far as the head looks at them."""

    files: ModelFiles
    inspected: "Inspected"
    teacher: "CheckedTeacher | None"


def prepare(attempt: Attempt, crew: Crew) -> Preparation:
    """Check storage, model and data and write the tokenised data.

    The data is prepared once: later attempts take the same, whatever has become of its source; and so do other jobs with the same data.
    No worker is asked for, unless examples are to be made by a model that no endpoint serves. Raises JobError.
    """
    from finetune_trainer import data_cache
    from finetune_trainer.evaluation.others import find_others
    from finetune_trainer.model import longest_example
    from finetune_trainer.quantization import check_quantization, gpus_here

    job, own = attempt.job, attempt.own
    attempt.reporter.start_stage("Prepare", "checking the storage, the model and the data", workers_wanted=0)
    attempt.storage.check_writable()
    check_free(attempt.storage, job, own)
    check_quantization(job, gpus_here() if attempt.environment.local else gpus_of(job.spec.compute))
    find_others(attempt.storage, job)
    if not _is_trained(attempt):
        _check_suites(attempt)

    facts = own.read_json(PREPARED_FACTS) or {}
    models = _models(attempt, facts)
    if "folder" not in facts or not data_cache.is_there(attempt.storage, facts["folder"], facts["digest"]):
        before, facts = facts.get("digest"), _prepared(attempt, crew, models)
        if before not in (None, facts["digest"]):
            _forget_measured(own)
        own.write_json(PREPARED_FACTS, facts)
    data_cache.mark_used(attempt.storage, facts["folder"])

    base: dict[str, Any] = {
        "model": {"source": job.spec.model.source, "revision": models.files.revision},
        "data": {"digest": facts["digest"]},
    }
    config = config_of(base, job)
    if models.teacher is not None:
        config["teacher"] = {"source": models.teacher.source, "revision": models.teacher.revision}
    resolved = Resolved(model_revision=models.files.revision, data_digest=facts["digest"], config_digest=digest_of(config))
    _tell(attempt, resolved, DataSummary.model_validate(facts["data"]), tuple(facts.get("warnings", ())))
    longest = longest_example(models.files, roomiest(job).spec.method)
    return Preparation(job, models.files.base, models.inspected.tokenizer, longest, resolved, config, facts["folder"])


def _models(attempt: Attempt, facts: dict[str, Any]) -> _Models:
    """The model and the teacher, checked without their weights."""
    from finetune_trainer.model import inspect_model
    from finetune_trainer.teacher import check_teacher

    job = attempt.job
    files = fetch_model(job.spec.model, attempt.mounts, attempt.cache, weights=False, revision=facts.get("revision"))
    inspected = inspect_model(files, job)
    attempt.reporter.update(model=inspected.summary)
    attempt.console.say(f"model {files.base.name} at {files.revision}")
    teacher = check_teacher(job, files, inspected.tokenizer, attempt.mounts, attempt.cache, facts.get("teacherRevision"))
    if teacher is not None:
        attempt.console.say(f"teacher {teacher.source} at {teacher.revision}")
    return _Models(files, inspected, teacher)


def _prepared(attempt: Attempt, crew: Crew, models: _Models) -> dict[str, Any]:
    """Have the data prepared, or find it prepared. Returns what later attempts are to know."""
    from finetune_trainer import data_cache
    from finetune_trainer.endpoint_answers import endpoint_teacher
    from finetune_trainer.model import longest_example
    from finetune_trainer.teacher import shortest_limit

    job, files, tokenizer = attempt.job, models.files, models.inspected.tokenizer
    longest = shortest_limit(longest_example(files, roomiest(job).spec.method), models.teacher)
    served = endpoint_teacher(job, tokenizer, attempt.mounts, attempt.storage, attempt.tell)
    _check_knowledge(attempt)
    made = _made(attempt, crew, models)
    entry = data_cache.find_or_prepare(attempt.storage, job, attempt.mounts, tokenizer, longest, served, made)
    attempt.console.say(f"data {'written to' if entry.is_new else 'prepared before, in'} {attempt.storage.locate(entry.name)}")
    facts = {"revision": files.revision, "digest": entry.manifest["digest"], "data": entry.manifest["summary"], "folder": entry.name}
    facts["warnings"] = list(entry.manifest.get("warnings", ()))
    return facts | ({"teacherRevision": models.teacher.revision} if models.teacher is not None else {})


def _forget_measured(own: Storage) -> None:
    """Remove what was measured on other data: the prepared folder was gone, and what it is made from has changed meanwhile.

    Answers are known by their place in a suite, so they would pass for answers to what stands there now. A training that has begun is
    refused by its checkpoints, and a search's trials by their digest.
    """
    from finetune_trainer.loop import BASELINE

    for name in ("answers", "suites", BASELINE):
        own.remove(name)


def _is_trained(attempt: Attempt) -> bool:
    """Whether an earlier attempt has trained: what scores the answers is asked next then, and need not be there if all is scored."""
    from finetune_trainer.evaluation.markdown import HELD

    return any(attempt.own.exists(f"{name}/{MANIFEST}") for name in (RESULT, HELD))


def _check_suites(attempt: Attempt) -> None:
    """Find out, before anything is paid for, whether the suites' encoders load and their judges answer. Raises JobError."""
    from finetune_trainer.evaluation.given import Givers
    from finetune_trainer.evaluation.lm_eval import check_tasks

    for place, suite in enumerate(attempt.job.spec.evaluation.suites):
        where = f"evaluation.suites[{place}]"
        if suite.lm_eval is not None:
            check_tasks(suite, where)
        elif suite.encoder is not None or suite.judge is not None:
            namespace = attempt.job.metadata.namespace
            Givers(suite, where, attempt.storage, namespace, attempt.mounts, attempt.cache, attempt.tell).check()


def _check_knowledge(attempt: Attempt) -> None:
    """Find out whether each knowledge base holds something: the baseline's, too, before workers or an endpoint write examples.

    Raises JobError (KnowledgeBaseInvalid, AuthenticationFailed, StorageUnavailable).
    """
    from finetune_trainer.retrieval.knowledge import check_knowledge, files_of

    preparation, baseline = attempt.job.spec.data.preparation, attempt.job.spec.baseline
    named = {"contentPoints": preparation.content_points, "questions": preparation.questions}
    bases = {f"data.preparation.{name}": part.knowledge_base for name, part in named.items() if part is not None}
    for place, prompt in enumerate(baseline.prompts if baseline else ()):
        if prompt.retrieval is not None:
            bases[f"baseline.prompts[{place}].retrieval"] = prompt.retrieval.knowledge_base
    for field, base in bases.items():
        check_knowledge(base, files_of(base, attempt.mounts, f"{field}.knowledgeBase"))


def _made(attempt: Attempt, crew: Crew, models: _Models) -> "Input | None":
    """The examples that are to be made of documents."""
    from finetune_trainer.encoder import load_encoder
    from finetune_trainer.made_data import Means, made_rows

    means = Means(
        attempt.mounts,
        attempt.storage,
        attempt.job.metadata.namespace,
        lambda reference, field: load_encoder(reference.model_source(), attempt.mounts, attempt.cache, field),
        attempt.tell,
    )
    is_chat = models.inspected.tokenizer.chat_template is not None
    return made_rows(attempt.job, means, partial(_writer, attempt, crew, models), is_chat=is_chat)


def _writer(attempt: Attempt, crew: Crew, models: _Models, spec: GeneratorSpec | None, field: str) -> "Writer":
    """Who writes what examples are made of: an endpoint, another model, or the job's base model."""
    from finetune_trainer.asking import identity_of, served
    from finetune_trainer.endpoint_generator import EndpointGenerator, generator_at
    from finetune_trainer.made_data import Writer

    namespace = attempt.job.metadata.namespace
    if spec is not None and spec.endpoint is not None:
        behind = served(spec.endpoint, generator_at(f"{field}.endpoint"), attempt.mounts)
        identity = identity_of(spec.endpoint, namespace)
        return Writer(identity, lambda: EndpointGenerator(behind, attempt.storage, namespace, attempt.tell), keeps=True)
    return _model_writer(attempt, crew, models, spec)


def _model_writer(attempt: Attempt, crew: Crew, models: _Models, spec: GeneratorSpec | None) -> "Writer":
    """A model that the job's own workers write with."""
    from finetune_trainer.made_data import Writer
    from finetune_trainer.model import load_tokenizer
    from finetune_trainer.worker_generator import WorkerGenerator

    source, files, other = attempt.job.spec.model, models.files, None
    if spec is not None and spec.model is not None:
        source = spec.model.model_source()
        files = fetch_model(source, attempt.mounts, attempt.cache, weights=False)
        other = source.model_dump(mode="json", by_alias=True, exclude_none=True)
        if source.source.startswith("hf://"):
            other["revision"] = files.revision  # the workers take the very weights that the answers are kept under
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(files)
    identity = {"model": source.source, "revision": files.revision, "namespace": attempt.job.metadata.namespace}
    is_chat = tokenizer.chat_template is not None
    return Writer(identity, partial(WorkerGenerator, attempt, crew, str(models.files.revision), other, is_chat=is_chat))


def _tell(attempt: Attempt, resolved: Resolved, data: DataSummary, found: tuple[str, ...]) -> None:
    """What was found, in the report and in words."""
    spec = attempt.job.spec
    warnings = (*found, *advice(spec.method, data.train), *strategy_advice(spec.compute, processes_of(spec.compute)))
    attempt.reporter.update(resolved=resolved, data=data, warnings=warnings)
    for warning in found:
        attempt.console.say(warning)
    counts = f"{data.train:,} examples to train on ({data.tokens:,} tokens), {data.validation:,} validation, {data.test:,} test"
    attempt.console.say(f"data {counts}, {data.rejected:,} left out")
