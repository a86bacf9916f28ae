"""The stage Evaluate: the tuned model beside the untuned one, others' and earlier ones, its health, and the verdict of the gates."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetune_api.evaluation import BASELINE, EARLIER
from finetune_api.outcomes import COMPARED_MAX
from finetune_api.reasons import Reason
from finetune_api.status import Evaluation, Health
from finetune_trainer import checkpoint
from finetune_trainer.answering import Candidate
from finetune_trainer.attempt import Attempt, Preparation
from finetune_trainer.crew import Crew
from finetune_trainer.evaluation import compare
from finetune_trainer.evaluation.evidence import report_uri
from finetune_trainer.evaluation.health import GAP, forgetting, gap, overfitting
from finetune_trainer.evaluation.history import VALIDATION, Course, Point, read_history, train_loss
from finetune_trainer.evaluation.others import beside, find_others, reached
from finetune_trainer.evaluation.samples import Sample, samples_of
from finetune_trainer.evaluation.scores import Change, Measured, changes, results
from finetune_trainer.failures import as_job_error
from finetune_trainer.gate import judge
from finetune_trainer.keeping import CHECKPOINTS
from finetune_trainer.measuring import Answers, Measuring
from finetune_trainer.result import Result, read_result


@dataclass(frozen=True)
class Judgement:
    """What is known of a tuned model."""

    evaluation: Evaluation
    samples: tuple[Sample, ...]
    course: Course
    judges: Mapping[str, str] = field(default_factory=dict)
    """What became of a judge's comparisons, by the suite."""


@dataclass(frozen=True)
class _Compared:
    """A model's figures, with those that they are compared with, and the differences, by name: `baseline`, other jobs', `step-N`."""

    after: tuple[Measured, ...]
    others: Mapping[str, Sequence[Measured]]
    differences: Mapping[str, Sequence[Change]]
    judges: Mapping[str, str]
    """As in Judgement."""


@dataclass(frozen=True)
class _Tuned:
    """A checkpoint that has answered."""

    candidate: Candidate
    result: Result
    """What was trained until then."""


def evaluate(attempt: Attempt, preparation: Preparation, result: Result, crew: Crew) -> Judgement:
    """Measure the model after result.steps, and the untuned one where that was not done before. Raises JobError."""
    # Who has just trained is kept until nothing is left to ask: pods that were let go might not come back for long.
    attempt.reporter.start_stage("Evaluate", "measuring the tuned model", workers_wanted=attempt.reporter.report.workers_wanted)
    measuring = Measuring(attempt, preparation, crew)
    tuned = _tuned(measuring, result)
    untuned = measuring.ask_baseline("Evaluate", tuned.candidate)
    course = read_history(attempt.own)
    earlier = _ask_earlier(attempt, measuring, result, course)
    kept = attempt.reporter.report.workers_wanted if _may_go_on_soon(attempt, measuring) else 0
    attempt.reporter.announce(workers_wanted=kept, message="comparing the tuned model with the untuned one")
    compared = _compared(attempt, measuring, course, untuned, (tuned, *earlier))
    evaluation = _evaluation(attempt, measuring, result.steps, course, compared)
    answers = measuring.answers(tuned.candidate)
    samples = tuple(
        sample
        for asked in measuring.suites
        for sample in samples_of(asked.suite.name, asked.cases, untuned[asked.suite.name], answers[asked.suite.name])
    )
    attempt.reporter.announce(evaluation=evaluation)
    return Judgement(evaluation, samples, course, compared.judges)


def try_earlier(attempt: Attempt, preparation: Preparation, result: Result, judgement: Judgement, crew: Crew) -> tuple[Result, Judgement]:
    """The earlier checkpoint that passes all gates and has the lowest validation loss; where none does, what there was.

    Every checkpoint that is kept is measured, so several are several chances (see gate.py); one that is damaged is passed over. Raises
    JobError.
    """
    storage = attempt.own.at(CHECKPOINTS)
    for found in _earlier(attempt, result, judgement.course):
        attempt.console.say(f"a gate is not passed: trying the checkpoint of step {found.steps}")
        try:
            tokens = checkpoint.find(storage, found.steps, preparation.config, proven=True).trained_tokens
            earlier = replace(found, trained_tokens=tokens)
            judged = evaluate(attempt, preparation, earlier, crew)
            if judged.evaluation.gates_verdict == "Passed":
                return _exported(attempt, preparation, earlier, crew), judged
        except Exception as error:
            if as_job_error(error).reason != Reason.CHECKPOINT_CORRUPTED:
                raise
            attempt.console.say(f"the checkpoint of step {found.steps} is damaged, and is passed over")
    attempt.reporter.announce(evaluation=judgement.evaluation)
    return result, judgement


def _earlier(attempt: Attempt, result: Result, course: Course) -> list[Result]:
    """The checkpoints before the result's that are kept, that with the lowest validation loss first; the tokens are not theirs."""
    known = {point.step: dict(point.values) for point in course.held_out}
    steps = checkpoint.steps_of(attempt.own.at(CHECKPOINTS))
    kept = [step for step in steps if step < result.steps]  # with early stopping there are later ones
    kept.sort(key=lambda step: (known.get(step, {}).get(VALIDATION, math.inf), -step))
    losses = ({name.removesuffix("/loss"): value for name, value in known.get(step, {}).items()} for step in kept)
    return [replace(result, steps=step, after=after) for step, after in zip(kept, losses, strict=True)]


def _tuned(measuring: Measuring, result: Result) -> _Tuned:
    return _Tuned(measuring.candidate(f"step-{result.steps}", step=result.steps), result)


def _ask_earlier(attempt: Attempt, measuring: Measuring, result: Result, course: Course) -> list[_Tuned]:
    """Have the earlier checkpoints answer that the result is to stand beside; in the order of their steps. Raises JobError.

    They are not asked with the result's: one that is damaged is passed over, where damage to the result's would have it trained again.
    """
    plan = attempt.job.spec.evaluation
    if EARLIER not in plan.compare_with:
        return []
    room = COMPARED_MAX - len(plan.other_jobs)
    found = [_tuned(measuring, each) for each in _earlier(attempt, result, course)]
    while asked := found[:room]:
        try:
            measuring.ask([each.candidate for each in asked], "Evaluate")
            break
        except Exception as error:
            damaged = next((each for each in asked if measuring.left(each.candidate)), None)  # they answer in this order
            if as_job_error(error).reason != Reason.CHECKPOINT_CORRUPTED or damaged is None:
                raise
            what = f"the checkpoint of step {damaged.result.steps} is damaged: it is not among the results"
            attempt.following.warn((what,))
            found.remove(damaged)
    return sorted(asked, key=lambda each: each.result.steps)


def _may_go_on_soon(attempt: Attempt, measuring: Measuring) -> bool:
    """Whether an earlier checkpoint may be asked next, in seconds: no other model is waited for to score the answers."""
    plan = attempt.job.spec.evaluation
    return bool(plan.gates) and plan.on_gate_failure == "tryEarlierCheckpoint" and not measuring.waits


def _exported(attempt: Attempt, preparation: Preparation, earlier: Result, crew: Crew) -> Result:
    """Have the workers leave an earlier checkpoint's weights as the result."""
    from finetune_trainer.worker_group import fit_export

    compute = attempt.job.spec.compute
    told = {name: getattr(earlier, name) for name in ("steps", "trained_tokens", "before", "after")}
    config = {**preparation.for_workers, "result": told}
    attempt.reporter.announce(workers_wanted=compute.workers.max, message=f"writing the model of step {earlier.steps}")

    def done() -> Result | None:
        found = read_result(attempt.own, preparation.config)
        return found if found is not None and found.steps == earlier.steps else None

    return crew.run(lambda group, _: fit_export(compute, config, group, attempt.scratch), done)


def _compared(attempt: Attempt, measuring: Measuring, course: Course, untuned: Answers, asked: Sequence[_Tuned]) -> _Compared:
    """All figures of the first that was asked, and how they differ from those of the others."""
    plan, (tuned, *earlier) = attempt.job.spec.evaluation, asked
    losses = compare(tuned.result.before, tuned.result.after, per_token=_per_token(attempt)).results
    before = (
        *(Measured(each.metric, each.baseline) for each in losses if each.baseline is not None),
        *measuring.measured(measuring.candidate(BASELINE), untuned),
    )
    before = (*before, *_gap(before, course, 0))
    after = _figures(attempt, measuring, course, untuned, tuned)
    judges = {each.suite.name: words for each in measuring.suites if (words := each.givers.comparison) is not None}
    suites = [(each.suite, each.cases) for each in measuring.suites]
    found = find_others(attempt.storage, attempt.job)
    others = {BASELINE: before} | {other.name: reached(other, suites, plan.confidence) for other in found}
    others |= {each.candidate.name: _figures(attempt, measuring, course, untuned, each) for each in earlier}
    differences = {name: changes(after, figures, plan.confidence) for name, figures in others.items()}
    return _Compared(after, others, differences, judges)


def _figures(attempt: Attempt, measuring: Measuring, course: Course, untuned: Answers, tuned: _Tuned) -> tuple[Measured, ...]:
    """All figures of a model that was trained."""
    losses = compare(tuned.result.before, tuned.result.after, per_token=_per_token(attempt)).results
    found = (
        *(Measured(each.metric, each.value) for each in losses if each.value is not None),
        *measuring.measured(tuned.candidate, untuned),
    )
    return (*found, *_gap(found, course, tuned.result.steps))


def _per_token(attempt: Attempt) -> bool:
    """Whether the losses on held-out data are means over tokens."""
    return attempt.job.spec.objective.dpo is None


def _gap(after: Sequence[Measured], course: Course, step: int) -> tuple[Measured, ...]:
    """train/gap after a step, where both losses are known."""
    known = next((each for each in after if each.metric == VALIDATION), None)
    trained = train_loss(course, step)
    if known is None or trained is None:
        return ()
    return (gap(Measured("train/loss", trained), known),)


def _evaluation(attempt: Attempt, measuring: Measuring, step: int, course: Course, compared: _Compared) -> Evaluation:
    """What the status tells of them."""
    before, differences = compared.others[BASELINE], compared.differences[BASELINE]
    others = {name: figures for name, figures in compared.others.items() if name != BASELINE}
    values = {each.metric: each for each in compared.after}
    by_name = {name: {each.metric: each for each in found} for name, found in compared.differences.items()}
    return Evaluation(
        results=beside(results(compared.after, before, differences), others, compared.differences),
        gates=judge(attempt.job.spec.evaluation.gates, values, by_name),
        health=_health(measuring, step, course, compared),
        candidate=step,
        report=report_uri(attempt.storage, attempt.job),
    )


def _health(measuring: Measuring, step: int, course: Course, compared: _Compared) -> tuple[Health, ...]:
    before, changed = compared.others[BASELINE], compared.differences[BASELINE]
    forgotten = (forgetting(asked.suite, before, changed) for asked in measuring.suites)
    found = [each for each in forgotten if each is not None]
    known = next((each for each in compared.after if each.metric == GAP), Measured(GAP, None))
    return (*found, overfitting(_ended(course, step), known, step))


def _ended(course: Course, step: int) -> Course:
    """The course up to the step that is judged."""

    def until(points: tuple[Point, ...]) -> tuple[Point, ...]:
        return tuple(point for point in points if point.step <= step)

    return replace(course, train=until(course.train), held_out=until(course.held_out))
