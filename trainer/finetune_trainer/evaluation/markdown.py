"""The report of a job for people: what was measured, what was decided by it, and why. Pure: the same findings give the same text.

It is read in browsers and printed. What users and models have written is quoted (`escaping`), never a part of the markup.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_api.evaluation import EARLIER
from finetune_api.report import Report
from finetune_api.status import DataSummary, Evaluation, EvaluationResult
from finetune_api.v1alpha1 import FineTuneJob
from finetune_trainer.evaluation.escaping import block, code, inline
from finetune_trainer.evaluation.figures import ABSENT, change_of, interval, kind_of, number, signed, signed_interval
from finetune_trainer.evaluation.history import Course
from finetune_trainer.evaluation.samples import Sample
from finetune_trainer.evaluation.search_section import search_section
from finetune_trainer.evaluation.tables import table
from finetune_trainer.trials import Trial

HELD = "held"
"""Where artifacts that are held back stand, in the job's own folder of output.storage."""
LOSSES, PROMPTS, SEARCH = "loss.svg", "prompts.svg", "search.svg"
Ending = Literal["passed", "published", "held", "failed", "sufficient"]


@dataclass(frozen=True)
class Findings:
    """All that a report tells."""

    job: FineTuneJob
    report: Report
    """What was counted and measured."""
    course: Course = field(default_factory=Course)
    samples: tuple[Sample, ...] = ()
    trials: tuple[Trial, ...] = ()
    """Of the search."""
    judges: Mapping[str, str] = field(default_factory=dict)
    """What became of a judge's comparisons, by the suite."""

    @property
    def evaluation(self) -> Evaluation:
        """The results and verdicts; empty where nothing was trained."""
        return self.report.evaluation or Evaluation()

    @property
    def ending(self) -> Ending:
        """What follows from the verdicts."""
        if self.report.sufficient:
            return "sufficient"
        verdict = self.evaluation.gates_verdict
        if verdict is None:
            return "published"
        if verdict == "Passed":
            return "passed"
        return "failed" if self.job.spec.evaluation.on_gate_failure == "fail" else "held"


def metrics_picture(place: int) -> str:
    """File name of one of the pictures of metrics, from 1."""
    return f"metrics-{place}.svg"


def markdown(findings: Findings, pictures: Sequence[str]) -> str:
    """The whole report; `pictures` are the files that stand beside it."""
    sections = [
        _summary(findings),
        _gates(findings),
        _results(findings, pictures),
        _others(findings, "Beside other jobs", "other job", checkpoints=False),
        _others(findings, "Beside earlier checkpoints", "checkpoint", checkpoints=True),
        _judges(findings),
        _health(findings),
        _training(findings, pictures),
        _prompts(findings, pictures),
        _search(findings, pictures),
        _data(findings),
        _samples(findings),
        _origin(findings),
        _reading(findings),
    ]
    return "\n\n".join("\n".join(section) for section in map(list, sections) if section) + "\n"


_TITLES: dict[Ending, str] = {
    "passed": "all gates passed",
    "published": "measured",
    "held": "held back",
    "failed": "gates not passed",
    "sufficient": "a prompt is enough",
}


def _summary(findings: Findings) -> Iterator[str]:
    gates, ending = findings.evaluation.gates, findings.ending
    passed = sum(gate.verdict == "Passed" for gate in gates)
    count = f"{passed} of {len(gates)} gates {'is' if passed == 1 else 'are'} passed"
    yield f"# {findings.job.metadata.name}: {_TITLES[ending]}"
    yield ""
    if ending == "sufficient":
        yield "**A prompt for the untuned model reaches `baseline.sufficientIf`: nothing was trained, and nothing is published.**"
    elif ending == "published":
        yield "**The job has no gates: the result is published whatever was measured.**"
    elif ending == "passed":
        yield f"**{count}: the result is published.**"
    else:
        aside = code(f".finetune/{findings.job.metadata.uid}/{HELD}")
        kept = f"the artifacts are kept aside in {aside} of output.storage" if ending == "held" else "the artifacts are not kept"
        yield f"**{count}: nothing is published, {kept}.**"
    if findings.evaluation.candidate is not None:
        yield f"What was measured is the model after step {findings.evaluation.candidate:,}."
    for warning in findings.report.warnings:
        yield f"\n> Warning: {inline(warning, 600)}"


def _gates(findings: Findings) -> Iterator[str]:
    gates = findings.evaluation.gates
    if not gates:
        return
    yield "## Gates"
    yield ""
    yield from table(
        ("verdict", "metric", "required", "observed", _interval_title(findings)),
        (
            (
                f"**{gate.verdict}**",
                code(gate.metric),
                inline(gate.required) + (f" than {code(gate.over)}" if gate.over and gate.over not in gate.required else ""),
                number(gate.observed),
                interval(gate.low, gate.high),
            )
            for gate in gates
        ),
        "lllrr",
    )
    if any(gate.verdict == "Inconclusive" for gate in gates):
        yield ""
        yield "Inconclusive: the bound lies within the interval. More examples in the suite make the interval narrower."


def _results(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    results = findings.evaluation.results
    if not results:
        return
    yield "## Results"
    yield ""
    for name in pictures:
        if name.startswith("metrics-"):
            yield f"![The untuned and the tuned model's metrics, with intervals; the table below has the same figures]({name})"
            yield ""
    title = _interval_title(findings)
    yield from table(
        ("metric", "untuned", "tuned", title, "change", title, "", "examples"), (_result_row(result) for result in results), "lrrrrrlr"
    )


def _result_row(result: EvaluationResult) -> tuple[str, ...]:
    change = change_of(result)
    kind = kind_of(result.metric, change)
    return (
        code(result.metric),
        number(result.baseline),
        number(result.value),
        interval(result.low, result.high),
        signed(change.value) if change else ABSENT,
        signed_interval(change),
        kind if kind and kind != "no interval" else "",
        f"{result.n:,}" if result.n is not None else ABSENT,
    )


def _others(findings: Findings, title: str, what: str, *, checkpoints: bool) -> Iterator[str]:
    """With checkpoints in compareWith the others are checkpoints, but for the jobs that it names."""
    plan = findings.job.spec.evaluation
    rows = [
        (
            code(result.metric),
            code(other.other),
            number(result.value),
            number(other.value),
            signed(other.difference.value) if other.difference else ABSENT,
            signed_interval(other.difference),
        )
        for result in findings.evaluation.results
        for other in result.compared
        if checkpoints == (EARLIER in plan.compare_with and other.other not in plan.compare_with)
    ]
    if rows:
        yield f"## {title}"
        yield ""
        yield from table(("metric", what, "this job", "the other", "difference", _interval_title(findings)), rows, "llrrrr")


def _judges(findings: Findings) -> Iterator[str]:
    if findings.judges:
        yield "## Judges"
        yield ""
        for suite, words in findings.judges.items():
            yield f"- {code(suite)}: {inline(words, 600)}."
        yield ""
        yield "Each pair was shown in both orders. A judge that goes by the place chooses the first answer in far more, or far fewer, than"
        yield "half of its decisions; a pair that goes with the place alone counts as a tie."


def _health(findings: Findings) -> Iterator[str]:
    if findings.evaluation.health:
        yield "## Health"
        yield ""
        yield from table(
            ("check", "suite", "verdict", "why"),
            (
                (item.name, code(item.suite) if item.suite else "", f"**{item.verdict}**", inline(item.message, 600))
                for item in findings.evaluation.health
            ),
            "llll",
        )


def _training(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    if LOSSES in pictures:
        yield "## Training"
        yield ""
        yield f"![Training and validation loss against optimiser steps, the gap between them, and the learning rate]({LOSSES})"
        yield ""
        yield "The gap is the validation loss less the mean training loss since the validation before. A gap that grows while the"
        yield "validation loss rises means that the model learns its examples by heart."


def _prompts(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    entries = findings.report.baseline
    if not entries:
        return
    yield "## Prompts for the untuned model"
    yield ""
    if PROMPTS in pictures:
        yield f"![What each prompt reaches, with intervals; the table below has the same figures]({PROMPTS})"
        yield ""
    yield from table(
        ("prompt", "model", "metric", "value", _interval_title(findings), ""),
        (
            (
                code(entry.prompt),
                code(entry.model) if entry.model else "base model",
                code(entry.metric),
                number(entry.value),
                interval(entry.low, entry.high),
                "**best**" if entry.best else "",
            )
            for entry in entries
        ),
        "lllrrl",
    )


def _search(findings: Findings, pictures: Sequence[str]) -> Iterator[str]:
    plan, summary = findings.job.spec.search, findings.report.search
    if plan is not None and summary is not None:
        yield from search_section(plan.goal, summary, findings.trials, SEARCH if SEARCH in pictures else None)


def _data(findings: Findings) -> Iterator[str]:
    data = findings.report.data
    if data is None:
        return
    yield "## Data"
    yield ""
    yield from table(("", "examples"), _data_rows(data), "lr")
    if length := data.tokens_per_example:
        yield ""
        yield (
            f"Tokens of a training example: {length.min:,} to {length.max:,}, half have at most {length.median:,}, "
            f"nineteen of twenty at most {length.p95:,}; {data.tokens:,} in all."
        )
    if data.made_samples:
        yield ""
        yield "Some of the examples that were made:"
        for text in data.made_samples:
            yield ""
            yield block(text)


def _data_rows(data: DataSummary) -> Iterator[tuple[str, str]]:
    rows = {
        "training": data.train,
        "made from documents, wherever they then went": data.made,
        "validation": data.validation,
        "test": data.test,
        "left out: could not be used": data.rejected,
        "left out: duplicates": data.duplicates,
        "training examples that also stand in validation, test or suites": data.leaked,
    }
    return ((name, f"{count:,}") for name, count in rows.items() if count or name in ("training", "validation"))


def _samples(findings: Findings) -> Iterator[str]:
    if not findings.samples:
        return
    yield "## Samples"
    yield ""
    yield "Evenly spread over each suite, not chosen."
    for sample in findings.samples:
        yield ""
        yield f"### {sample.suite}, example {inline(sample.id)}"
        for title, text in (
            ("Prompt", sample.prompt),
            ("Golden answer", sample.reference),
            ("Untuned", sample.untuned),
            ("Tuned", sample.tuned),
        ):
            yield ""
            yield f"{title}:" if text else f"{title}: nothing"
            if text:
                yield ""
                yield block(text)


def _origin(findings: Findings) -> Iterator[str]:
    """How the model was made. Names of Secrets and addresses of endpoints are left out."""
    job, resolved = findings.job, findings.report.resolved
    yield "## Origin"
    yield ""
    rows = [
        ("job", f"{code(job.metadata.namespace)} / {code(job.metadata.name)}, uid {code(job.metadata.uid)}"),
        ("model", code(job.spec.model.source)),
        ("revision", code(resolved.model_revision or "") if resolved else ""),
        ("data digest", code(resolved.data_digest or "") if resolved else ""),
        ("configuration digest", code(resolved.config_digest or "") if resolved else ""),
    ]
    yield from table(("", ""), ((name, value) for name, value in rows if value), "ll")
    yield ""
    yield block(json.dumps(_settings(job), indent=2), 6000, "json")


def _settings(job: FineTuneJob) -> dict[str, Any]:
    dumped = job.spec.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        include={"method", "objective", "training"},
        exclude={"objective": {"distillation": {"teacher"}}},
    )
    return dict(dumped)


def _reading(findings: Findings) -> Iterator[str]:
    if not findings.evaluation.results and not findings.report.baseline:
        return
    yield "## How to read this"
    yield ""
    yield f"- Intervals have a confidence of {_percent(findings)}, by bootstrap over the examples. Those of a change are paired: both"
    yield "  models answered the same examples."
    yield "- A change is *better* or *worse* where its whole interval is; where it holds 0 it is *not clear*, and more examples would tell."
    yield "- Losses of suites are means per labelled token, in nats, of the golden answers."
    if findings.job.spec.objective.dpo is not None:
        yield "- Losses of validation and test data are means per pair of answers."


def _interval_title(findings: Findings) -> str:
    return f"{_percent(findings)} interval"


def _percent(findings: Findings) -> str:
    return f"{100 * findings.job.spec.evaluation.confidence:g} %"
