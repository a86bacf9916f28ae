"""The head's way through a job, from top to bottom: prepare -> train -> evaluate -> publish."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.reasons import Reason
from finetune_api.report import Outcome, Report, parse_report
from finetune_api.scrub import scrub
from finetune_api.status import TEXT_MAX, DataSummary, ModelSummary, Resolved
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.console import Console
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.comparison import compare
from finetune_trainer.export import check_free, publish
from finetune_trainer.failures import is_final
from finetune_trainer.following import Following
from finetune_trainer.interruption import InterruptedRunError, Interruption
from finetune_trainer.manifest import digest_of
from finetune_trainer.methods.advice import advice, strategy_advice
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model_card import Publication
from finetune_trainer.ray_cluster import Growth, RayHead, driver, gpus_of, processes_of, wait_for_workers
from finetune_trainer.report import Reporter
from finetune_trainer.result import RESULT, Result, read_result
from finetune_trainer.sources import Mounts, resolve_storage
from finetune_trainer.storage import Storage, storage_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREPARED_FACTS = "prepared.json"
REPORT = "report.json"
KEEP_SECONDS = 10.0
"""How often the report is left in the storage while workers train."""
MAX_FRUITLESS = 20
"""Times in a row that the workers may leave without having taken a step, because one of them is taken away."""
STOP_SECONDS = 55.0
"""After a call to stop, the workers have so long to save a checkpoint; the operator's grace period is longer."""


@dataclass
class Attempt:
    """One attempt of one job, as the head sees it."""

    environment: Environment
    job: FineTuneJob
    reporter: Reporter
    console: Console
    ray_head: RayHead
    following: Following
    interruption: Interruption

    @property
    def mounts(self) -> Mounts:
        """The pod's volumes."""
        return Mounts(self.environment.volumes, self.environment.local)

    @property
    def storage(self) -> Storage:
        """output.storage."""
        return storage_at(resolve_storage(self.job.spec.output, self.mounts))

    @property
    def own(self) -> Storage:
        """The job's own folder in output.storage."""
        return self.storage.at(f".finetune/{self.job.metadata.uid}")

    @property
    def scratch(self) -> Path:
        """A folder on this machine that goes with the attempt."""
        return scratch_folder(self.job.metadata.uid, self.environment.attempt)

    def tell(self, text: str) -> None:
        """Tell people how far a long stage is: in the log, and in the status."""
        self.console.say(text)
        self.reporter.update(message=text[:TEXT_MAX])

    def keep_report(self, outcome: Outcome | None = None) -> None:
        """Leave the report in the storage, for people and for the next attempt. It is not worth failing for."""
        report = self.reporter.report
        try:
            self.own.write_json(REPORT, report.model_copy(update={"outcome": outcome or report.outcome}).to_json())
        except Exception as error:
            self.console.say(f"the report could not be kept in the storage: {scrub(str(error))}")


@dataclass(frozen=True)
class Preparation:
    """What is known before a worker is asked for."""

    base: BaseModel
    tokenizer: "PreTrainedTokenizerBase"
    resolved: Resolved
    config: dict[str, Any]
    """Everything that the result follows from."""
    data: str
    """Folder of the prepared data in output.storage."""


def run_stages(attempt: Attempt) -> None:
    """All stages in order. Raises JobError, InterruptedRunError, or what nobody expected."""
    earlier = earlier_report(attempt)
    if earlier is not None and earlier.outcome == "Succeeded":
        repeat(attempt, earlier)
        return
    attempt.following.begin(earlier)
    preparation = prepare(attempt)
    result = read_result(attempt.own, preparation.config) or train(attempt, preparation)
    publish_result(attempt, preparation, result)


def earlier_report(attempt: Attempt) -> Report | None:
    """What an earlier attempt of this job left in the storage."""
    return parse_report(json.dumps(attempt.own.read_json(REPORT)))


def repeat(attempt: Attempt, earlier: Report) -> None:
    """Say again how the job ended: an earlier attempt did everything, and only its word was lost. This one has used and lost nothing."""
    own = ("attempt", "revision", "outcome", "usage", "lost_steps")
    attempt.reporter.update(**{name: getattr(earlier, name) for name in Report.model_fields if name not in own})


def prepare(attempt: Attempt) -> Preparation:
    """Check storage, model and data and write the tokenised data, so that a fault costs no worker.

    The data is prepared once: later attempts take the same, whatever has become of its source; and so do other jobs with the same data.
    """
    from finetune_trainer import data_cache
    from finetune_trainer.endpoint_answers import endpoint_teacher
    from finetune_trainer.model import inspect_model, longest_example
    from finetune_trainer.model_files import fetch_model
    from finetune_trainer.quantization import check_quantization, gpus_here
    from finetune_trainer.teacher import check_teacher, shortest_limit

    job, own = attempt.job, attempt.own
    attempt.reporter.start_stage("Prepare", "checking the storage, the model and the data", workers_wanted=0)
    attempt.storage.check_writable()
    check_free(attempt.storage, job, own)
    check_quantization(job, gpus_here() if attempt.environment.local else gpus_of(job.spec.compute))

    facts = own.read_json(PREPARED_FACTS) or {}
    cache = attempt.scratch / "cache"
    files = fetch_model(job.spec.model, attempt.mounts, cache, weights=False, revision=facts.get("revision"))
    inspected = inspect_model(files, job)
    tokenizer = inspected.tokenizer
    attempt.reporter.update(model=inspected.summary)
    attempt.console.say(f"model {files.base.name} at {files.revision}")
    teacher = check_teacher(job, files, tokenizer, attempt.mounts, cache, facts.get("teacherRevision"))
    if teacher is not None:
        attempt.console.say(f"teacher {teacher.source} at {teacher.revision}")

    if "folder" not in facts or not data_cache.is_there(attempt.storage, facts["folder"], facts["digest"]):
        longest = shortest_limit(longest_example(files, job.spec.method), teacher)
        served = endpoint_teacher(job, tokenizer, attempt.mounts, attempt.storage, attempt.tell)
        entry = data_cache.find_or_prepare(attempt.storage, job, attempt.mounts, tokenizer, longest, served)
        facts = {"revision": files.revision, "digest": entry.manifest["digest"], "data": entry.manifest["summary"], "folder": entry.name}
        facts |= {"teacherRevision": teacher.revision} if teacher is not None else {}
        own.write_json(PREPARED_FACTS, facts)
        attempt.console.say(f"data {'written to' if entry.is_new else 'prepared before, in'} {attempt.storage.locate(entry.name)}")
    data_cache.mark_used(attempt.storage, facts["folder"])

    config = {
        "model": {"source": job.spec.model.source, "revision": files.revision},
        "data": {"digest": facts["digest"]},
        **{
            part: getattr(job.spec, part).model_dump(mode="json", by_alias=True, exclude_none=True)
            for part in ("method", "objective", "training")
        },
    }
    if teacher is not None:
        config["teacher"] = {"source": teacher.source, "revision": teacher.revision}
    resolved = Resolved(model_revision=files.revision, data_digest=facts["digest"], config_digest=digest_of(config))
    data = DataSummary.model_validate(facts["data"])
    compute = job.spec.compute
    warnings = (*advice(job.spec.method, data.train), *strategy_advice(compute, processes_of(compute)))
    attempt.reporter.update(resolved=resolved, data=data, warnings=warnings)
    counts = f"{data.train:,} examples to train on ({data.tokens:,} tokens), {data.validation:,} validation, {data.test:,} test"
    attempt.console.say(f"data {counts}, {data.rejected:,} left out")
    return Preparation(files.base, tokenizer, resolved, config, facts["folder"])


def train(attempt: Attempt, preparation: Preparation) -> Result:
    """Ask for workers, train on them, and have them measure before and after. Raises InterruptedRunError once a checkpoint is saved."""
    compute, reporter, interruption = attempt.job.spec.compute, attempt.reporter, attempt.interruption
    reporter.start_stage("Train", "waiting for the workers", workers_wanted=compute.workers.max)
    from finetune_trainer.worker_group import fit  # while the workers start: torch and Ray Train take seconds to import

    attempt.ray_head.wait_ready()
    with driver(attempt.environment):
        interruption.listen()
        fruitless = 0
        for group in itertools.count(1):
            interruption.at_once = True  # the group before has saved its checkpoint, and the next one has done nothing yet
            interruption.check()
            nodes = wait_for_workers(
                compute,
                attempt.job.spec.pre_running_deadline_seconds,
                lambda joined: attempt.console.say(f"{joined} of {compute.workers.max} workers have joined"),
            )
            attempt.following.workers_joined(nodes * processes_of(compute), on_gpus=gpus_of(compute) > 0)
            saved = _saved_step(attempt)
            config = {"revision": preparation.resolved.model_revision, "config": preparation.config, "data": preparation.data}
            name = f"attempt-{attempt.environment.attempt}-{group}"
            why = _follow(attempt, _Background(partial(fit, compute, config, name, attempt.scratch)))
            result = read_result(attempt.own, preparation.config)
            if result is not None:
                return result
            interruption.check()
            attempt.console.say(why)
            fruitless = 0 if _saved_step(attempt) > saved else fruitless + 1
            if fruitless == MAX_FRUITLESS:
                break
    raise JobError(Reason.WORKERS_LOST, f"workers were taken away {MAX_FRUITLESS} times before they had taken a step")


def _follow(attempt: Attempt, training: "_Background") -> str:
    """Until the workers have left. Returns why, if it is not that they have come to the end. Raises what they raised."""
    following, growth = attempt.following, Growth(attempt.job.spec.compute)
    grown = False

    def look() -> None:
        nonlocal grown
        attempt.keep_report()
        following.regroup = growth.is_due(following.processes)
        grown = grown or following.regroup

    try:
        training.wait(attempt.interruption, _Periodically(KEEP_SECONDS, look))
    finally:
        following.workers_released()
    if grown:
        return "more workers have joined; going on with all of them"
    return "a worker is taken away; going on as soon as there are enough again"


def _saved_step(attempt: Attempt) -> int:
    """The step of the newest checkpoint."""
    checkpoints = attempt.reporter.report.checkpoints
    return checkpoints.latest.step if checkpoints and checkpoints.latest else 0


def publish_result(attempt: Attempt, preparation: Preparation, result: Result) -> None:
    """Compare, and put the result in its place. No worker is needed any more."""
    attempt.interruption.at_once = False
    evaluation = compare(result.before, result.after, per_token=attempt.job.spec.objective.dpo is None)
    attempt.reporter.update(evaluation=evaluation)
    attempt.reporter.start_stage("Publish", "publishing the result", workers_wanted=0)
    counts = attempt.reporter.report.model or ModelSummary()
    publication = Publication(attempt.job, preparation.base, preparation.tokenizer, result, preparation.resolved, evaluation, counts)
    artifacts = publish(publication, attempt.storage, attempt.own)
    attempt.reporter.update(artifacts=artifacts)
    for artifact in artifacts:
        attempt.console.say(f"published {artifact.uri} ({artifact.bytes:,} bytes, {artifact.digest})")
    attempt.keep_report("Succeeded")  # from here on an attempt that ends without a word need not be repeated, nor could it be
    try:
        attempt.own.remove(RESULT)
    except JobError as error:
        attempt.console.say(f"{RESULT} could not be removed: {scrub(error.message)}")


class _Periodically:
    """A call that is made at most once in so many seconds."""

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self._seconds, self._call, self._last = seconds, call, time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._call()


class _Background:
    """A call in a thread of its own, so that this one can hear a call to stop."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, name="fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def wait(self, interruption: Interruption, meanwhile: Callable[[], None]) -> None:
        """Until the call returns; after a call to stop no longer than STOP_SECONDS.

        Raises what the call raised, and InterruptedRunError where it was stopped.
        """
        asked: float | None = None
        while self._thread.is_alive():
            self._thread.join(timeout=0.2)
            meanwhile()
            if interruption.requested:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > STOP_SECONDS:
                    raise InterruptedRunError
        if self._error is not None:
            if interruption.requested and not is_final(self._error):
                raise InterruptedRunError from self._error
            raise self._error
