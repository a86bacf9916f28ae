"""The head's way through a job, from top to bottom: prepare -> baseline -> search -> train -> evaluate -> publish.

What a stage has done stands in output.storage: an attempt that begins anew goes through all of them, and does nothing a second time.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from finetune_api.figures import gates_in_words
from finetune_api.reasons import Reason
from finetune_api.report import Report, parse_report
from finetune_api.scrub import scrub
from finetune_api.status import ModelSummary
from finetune_trainer.attempt import REPORT, Attempt, Preparation
from finetune_trainer.crew import Crew
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.evidence import publish_report
from finetune_trainer.evaluation.markdown import HELD, Findings
from finetune_trainer.export import publish
from finetune_trainer.failures import as_job_error
from finetune_trainer.model_card import Publication
from finetune_trainer.result import RESULT, Result, read_result, write_result
from finetune_trainer.sources import check_servers
from finetune_trainer.storage import MANIFEST
from finetune_trainer.trials import Trial


def run_stages(attempt: Attempt) -> None:
    """All stages in order, or a measuring run. Raises JobError, InterruptedRunError, or what nobody expected."""
    check_servers(attempt.mounts)
    if attempt.job.spec.monitoring is not None:
        from finetune_trainer.monitoring_stage import measure_again

        measure_again(attempt)
        return
    from finetune_trainer.preparing import prepare

    earlier = earlier_report(attempt)
    if earlier is not None and earlier.outcome == "Succeeded":
        repeat(attempt, earlier)
        return
    attempt.following.begin(earlier)
    spec, trials = attempt.job.spec, tuple[Trial, ...]()
    with Crew(attempt) as crew:
        preparation = prepare(attempt, crew)
        if spec.plan_only:
            from finetune_trainer.planned import tell_plan

            tell_plan(attempt, preparation)
            return
        if spec.baseline is not None:
            from finetune_trainer.baseline_stage import measure_baseline

            if measure_baseline(attempt, preparation, crew, spec.baseline):
                attempt.keep_report("Succeeded")
                return
        if spec.search is not None:
            from finetune_trainer.search_stage import search

            preparation, trials = search(attempt, preparation, crew, spec.search)
        result = trained(attempt, preparation) or train(attempt, preparation, crew)
        from finetune_trainer.evaluation_stage import evaluate, try_earlier

        with forgotten_if_damaged(attempt):
            judgement = evaluate(attempt, preparation, result, crew)
        if judgement.evaluation.gates_verdict not in (None, "Passed") and spec.evaluation.on_gate_failure == "tryEarlierCheckpoint":
            result, judgement = try_earlier(attempt, preparation, result, judgement, crew)
    findings = Findings(preparation.job, attempt.reporter.report, judgement.course, judgement.samples, trials, judgement.judges)
    publish_report(attempt.storage, findings)
    check_gates(attempt, result)
    publish_result(attempt, preparation, result)


def earlier_report(attempt: Attempt) -> Report | None:
    """What an earlier attempt of this job left in the storage."""
    return parse_report(json.dumps(attempt.own.read_json(REPORT)))


def repeat(attempt: Attempt, earlier: Report) -> None:
    """Say again how the job ended: an earlier attempt did everything, and only its word was lost. This one has used and lost nothing."""
    own = ("attempt", "revision", "outcome", "usage", "lost_steps")
    attempt.reporter.update(**{name: getattr(earlier, name) for name in Report.model_fields if name not in own})


def trained(attempt: Attempt, preparation: Preparation) -> Result | None:
    """What an earlier attempt has trained, also where it was held back after that."""
    return read_result(attempt.own, preparation.config) or read_result(attempt.own, preparation.config, HELD)


@contextmanager
def forgotten_if_damaged(attempt: Attempt) -> Iterator[None]:
    """Forget the result where the checkpoint that it is of cannot be read: the next attempt would find it, and fail of the same, for ever.

    Without it that one sets the checkpoint aside and trains again from the one before.
    """
    try:
        yield
    except Exception as error:
        if as_job_error(error).reason == Reason.CHECKPOINT_CORRUPTED:
            for name in (RESULT, HELD):
                attempt.own.remove(name)
        raise


def train(attempt: Attempt, preparation: Preparation, crew: Crew) -> Result:
    """Train on the workers, which measure losses before and after. Raises InterruptedRunError once a checkpoint is saved."""
    compute = attempt.job.spec.compute
    attempt.reporter.start_stage("Train", "waiting for the workers", workers_wanted=compute.workers.max)
    from finetune_trainer.worker_group import fit  # while the workers start: torch and Ray Train take seconds to import

    return crew.run(
        lambda group, _: fit(compute, preparation.for_workers, group, attempt.scratch),
        lambda: read_result(attempt.own, preparation.config),
        lambda: _saved_step(attempt),
        grows=True,
    )


def _saved_step(attempt: Attempt) -> int:
    """The step of the newest checkpoint."""
    checkpoints = attempt.reporter.report.checkpoints
    return checkpoints.latest.step if checkpoints and checkpoints.latest else 0


def check_gates(attempt: Attempt, result: Result) -> None:
    """Raise JobError (GatesNotPassed, GatesInconclusive) where the model is not to be published; with `fail` its weights are not kept."""
    evaluation, plan = attempt.reporter.report.evaluation, attempt.job.spec.evaluation
    verdict = evaluation.gates_verdict if evaluation else None
    if evaluation is None or verdict in (None, "Passed"):
        return
    kept = ""
    if plan.on_gate_failure == "fail":
        # The figures stay: an attempt that comes after this one, because its word was lost, must not ask for workers once more.
        write_result(attempt.own, replace(result, kinds=()), lambda *_: None)
    else:
        if attempt.own.exists(f"{RESULT}/{MANIFEST}"):  # else what is there is the rest of one that was moved before
            attempt.own.move(RESULT, HELD)
        kept = f"; the artifacts are held in {attempt.own.locate(HELD)}"
    reason = Reason.GATES_NOT_PASSED if verdict == "Failed" else Reason.GATES_INCONCLUSIVE
    raise JobError(reason, f"{gates_in_words(evaluation)}{kept}; the report is {evaluation.report}")


def publish_result(attempt: Attempt, preparation: Preparation, result: Result) -> None:
    """Put the result in its place. No worker is needed any more."""
    attempt.interruption.at_once = False
    attempt.reporter.start_stage("Publish", "publishing the result", workers_wanted=0)
    report = attempt.reporter.report
    counts, evaluation = report.model or ModelSummary(), report.evaluation
    assert evaluation is not None  # noqa: S101 - the stage before has made it
    publication = Publication(preparation.job, preparation.base, preparation.tokenizer, result, preparation.resolved, evaluation, counts)
    artifacts = publish(publication, attempt.storage, attempt.own)
    attempt.reporter.update(artifacts=artifacts)
    for artifact in artifacts:
        attempt.console.say(f"published {artifact.uri} ({artifact.bytes:,} bytes, {artifact.digest})")
    attempt.keep_report("Succeeded")  # from here on an attempt that ends without a word need not be repeated, nor could it be
    try:
        attempt.own.remove(RESULT)
    except JobError as error:
        attempt.console.say(f"{RESULT} could not be removed: {scrub(error.message)}")
