"""The Prometheus series of jobs, made from their latest statuses at each scrape.

A job that is gone leaves none behind, and a restart loses nothing. A job has at most SERIES_PER_JOB series; no label holds free text.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.fields import METRIC_PATTERN
from finetune_api.methods import METHODS
from finetune_api.objectives import OBJECTIVES
from finetune_api.reasons import Reason
from finetune_api.status import EvaluationResult, StageName, Status, Verdict
from finetune_operator.queue_names import KUEUE_QUEUE, queue_of
from finetune_operator.usage_totals import UsageTotals, Used

SERIES_PER_JOB = 40
"""With those of its head, a job has 60 at most."""
RESULTS_SHOWN = 3
"""A job may have more measures than a monitoring system should have series of it: those that a gate looks at come first."""
CONDITIONS_SHOWN = ("Accepted", "WorkersReady", "GatesPassed", "Complete", "Failed", "Suspended", "Ready", "Stalled", "Degraded")
VERDICTS: tuple[str, ...] = get_args(Verdict)
OTHER_REASON = "Other"
DRIFTS_SHOWN = 2
_DRIFT_ORDER = ("Degraded", "Inconclusive", "Held", None)

Sample = tuple[tuple[str, ...], float]
"""Values of a family's labels beyond namespace and name, and the sample's value."""


@dataclass(frozen=True)
class Seen:
    """A job as it was last seen, and the time."""

    job: Mapping[str, Any]
    status: Status
    now: float
    """Unix time."""


@dataclass(frozen=True)
class _Family:
    """One metric of jobs and where its samples come from."""

    name: str
    help: str
    samples: Callable[[Seen], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    counter: bool = False

    def metric(self) -> Metric:
        family = CounterMetricFamily if self.counter else GaugeMetricFamily
        metric: Metric = family(self.name, self.help, labels=("namespace", "name", *self.labels))
        return metric


def _value(read: Callable[[Status], float | None]) -> Callable[[Seen], Iterable[Sample]]:
    return _timed(lambda seen: read(seen.status))


def _timed(read: Callable[[Seen], float | None]) -> Callable[[Seen], Iterable[Sample]]:
    def samples(seen: Seen) -> Iterator[Sample]:
        value = read(seen)
        if value is not None:
            yield (), float(value)

    return samples


def _progress(read: Callable[[Any], float | None]) -> Callable[[Seen], Iterable[Sample]]:
    return _value(lambda status: read(status.progress) if status.progress else None)


def _seconds(moment: str | None) -> float | None:
    return datetime.fromisoformat(moment).timestamp() if moment else None


def _info(seen: Seen) -> Iterator[Sample]:
    meta, spec = seen.job["metadata"], seen.job.get("spec", {})
    method = next((name for name in METHODS if name in spec.get("method", {})), "")
    objective = next((name for name in OBJECTIVES if name in spec.get("objective", {})), "")
    queue = queue_of(meta.get("labels") or {}, KUEUE_QUEUE, seen.status)
    yield (meta["uid"], method, objective, spec.get("model", {}).get("source", ""), queue), 1.0


def _phase(seen: Seen) -> Iterator[Sample]:
    yield (seen.status.phase or "Pending",), 1.0


def _reason(seen: Seen) -> Iterator[Sample]:
    ready = seen.status.condition("Ready")
    if ready:
        yield (closed(ready.reason),), 1.0


def closed(reason: str) -> str:
    """The reason, where it is of the documented set."""
    return reason if reason in set(Reason) else OTHER_REASON


def _conditions(seen: Seen) -> Iterator[Sample]:
    for condition in seen.status.conditions:
        if condition.type in CONDITIONS_SHOWN:
            yield (condition.type, condition.status), 1.0


def _results(seen: Seen) -> Iterator[Sample]:
    """The tuned model's value, and the untuned one's, of a few measures. Their names are those of a tenant's pod."""
    evaluation = seen.status.evaluation
    gated = {gate.metric for gate in evaluation.gates} if evaluation else set()
    named = [result for result in (evaluation.results if evaluation else ()) if re.fullmatch(METRIC_PATTERN, result.metric)]

    def ungated(result: EvaluationResult) -> bool:
        return result.metric not in gated

    for result in sorted(named, key=ungated)[:RESULTS_SHOWN]:
        for model, value in (("base", result.baseline), ("tuned", result.value)):
            if value is not None:
                yield (result.metric, model), value


def _gates(seen: Seen) -> Iterator[Sample]:
    gates = seen.status.evaluation.gates if seen.status.evaluation else ()
    for verdict in VERDICTS if gates else ():
        yield (verdict,), float(sum(gate.verdict == verdict for gate in gates))


def _trials(seen: Seen) -> Iterator[Sample]:
    search = seen.status.search
    if search:
        counts = {"completed": search.completed, "failed": search.failed, "pruned": search.pruned}
        yield from (((state,), float(count)) for state, count in counts.items())


def _drift(seen: Seen) -> Iterator[Sample]:
    """Of the metrics that are measured again, those that are degraded first: what they are now, less what they were at the release."""
    results = seen.status.monitoring.results if seen.status.monitoring else ()
    named = [each for each in results if each.difference is not None and re.fullmatch(METRIC_PATTERN, each.metric)]
    for result in sorted(named, key=lambda each: _DRIFT_ORDER.index(each.verdict))[:DRIFTS_SHOWN]:
        yield (result.metric,), float(result.difference or 0.0)


def _runs(seen: Seen) -> Iterator[Sample]:
    if monitoring := seen.status.monitoring:
        yield ("measured",), float(monitoring.runs)
        yield ("failed",), float(monitoring.failed_runs)


def _since_attempt(seen: Seen, stage: StageName) -> float | None:
    """Seconds from the current attempt's begin to the stage's; None where the stage has not begun in this attempt."""
    begin = _seconds(seen.status.attempt.start_time)
    begun = _seconds(next((each.start_time for each in seen.status.stages if each.name == stage), None))
    return begun - begin if begin is not None and begun is not None and begun >= begin else None


def _queue_wait(seen: Seen) -> float | None:
    waited, begin = _since_attempt(seen, "Prepare"), _seconds(seen.status.attempt.start_time)
    if waited is None and begin is not None and seen.status.attempt.running:
        return max(0.0, seen.now - begin)
    return waited


def _duration(seen: Seen) -> float | None:
    begin, end = _seconds(seen.status.start_time), _seconds(seen.status.completion_time)
    return None if begin is None else max(0.0, (seen.now if end is None else end) - begin)


FAMILIES: tuple[_Family, ...] = (
    _Family("finetune_job_info", "A job; always 1.", _info, labels=("uid", "method", "objective", "base_model", "queue")),
    _Family("finetune_job_status_phase", "1 for the phase that the job is in; the others have no series.", _phase, labels=("phase",)),
    _Family("finetune_job_status_reason", "1 for the reason of the condition Ready: why the job is as it is.", _reason, labels=("reason",)),
    _Family("finetune_job_condition", "1 for the status that the condition has.", _conditions, labels=("condition", "status")),
    _Family("finetune_job_failures", "Attempts that failed.", _value(lambda s: s.attempt.failures), counter=True),
    _Family(
        "finetune_job_restarts",
        "Attempts after the first, for whatever reason.",
        _value(lambda s: max(0, s.attempt.number - 1)),
        counter=True,
    ),
    _Family("finetune_job_preemptions", "Attempts that the cluster took away.", _value(lambda s: s.attempt.preemptions), counter=True),
    _Family("finetune_job_lost_steps", "Optimiser steps that had to be done again.", _value(lambda s: s.attempt.lost_steps), counter=True),
    _Family("finetune_job_workers_wanted", "Worker pods that the current stage needs.", _value(lambda s: s.workers_wanted)),
    _Family("finetune_job_workers_ready", "Worker pods that are ready.", _value(lambda s: s.workers_ready)),
    _Family(
        "finetune_job_queue_wait_seconds",
        "Time from the current attempt's begin until its head pod was at work; until now where it is not yet.",
        _timed(_queue_wait),
    ),
    _Family(
        "finetune_job_startup_duration_seconds",
        "Time from the current attempt's begin until its training began.",
        _timed(lambda seen: _since_attempt(seen, "Train")),
    ),
    _Family(
        "finetune_job_duration_seconds",
        "Time since the operator first acted on the job, up to its end where it has ended.",
        _timed(_duration),
    ),
    _Family(
        "finetune_job_gpu_seconds", "GPUs held, times seconds.", _value(lambda s: s.usage.gpu_seconds if s.usage else None), counter=True
    ),
    _Family(
        "finetune_job_trained_tokens",
        "Tokens of examples that steps were taken on, over all attempts.",
        _value(lambda s: s.usage.trained_tokens if s.usage else None),
        counter=True,
    ),
    _Family("finetune_job_progress_ratio", "Share of the training's steps that is done.", _progress(lambda p: p.percent / 100)),
    _Family("finetune_job_eta_seconds", "Estimated time to the end of the training.", _progress(lambda p: p.eta_seconds)),
    _Family(
        "finetune_job_progress_timestamp_seconds",
        "When the status last told of progress in the training.",
        _progress(lambda p: _seconds(p.last_update_time)),
    ),
    _Family(
        "finetune_job_checkpoint_step",
        "Optimiser step of the newest complete checkpoint.",
        _value(lambda s: s.checkpoints.latest.step if s.checkpoints and s.checkpoints.latest else None),
    ),
    _Family(
        "finetune_job_evaluation",
        f"Measures of the untuned and of the tuned model: {RESULTS_SHOWN} of a job, those with a gate first.",
        _results,
        labels=("metric", "model"),
    ),
    _Family("finetune_job_gates", "Gates by verdict.", _gates, labels=("verdict",)),
    _Family("finetune_job_search_trials", "Trials of the search that have ended, by how.", _trials, labels=("state",)),
    _Family(
        "finetune_job_drift",
        f"Fresh figure of the published model less the released one: {DRIFTS_SHOWN} of a job, those that are degraded first.",
        _drift,
        labels=("metric",),
    ),
    _Family("finetune_job_monitoring_runs", "Measuring runs of the published model, by result.", _runs, labels=("result",), counter=True),
    _Family(
        "finetune_job_monitoring_next_timestamp_seconds",
        "When the next measuring run is due; none while one is under way or held back.",
        _value(lambda s: _seconds(s.monitoring.next_run_time) if s.monitoring else None),
    ),
    _Family(
        "finetune_job_monitoring_timestamp_seconds",
        "When the last measuring run ended.",
        _value(lambda s: _seconds(s.monitoring.last_run_time) if s.monitoring else None),
    ),
)


def _namespaces(totals: Iterable[tuple[str, Used]]) -> Iterator[Metric]:
    """What jobs have used by namespace, whether they are still there or not."""
    since = "by the jobs of a namespace since this operator's process began, deleted ones included."
    seconds = CounterMetricFamily("finetune_namespace_gpu_seconds", f"GPUs held, times seconds, {since}", labels=["namespace"])
    tokens = CounterMetricFamily("finetune_namespace_trained_tokens", f"Tokens trained on {since}", labels=["namespace"])
    for namespace, used in totals:
        seconds.add_metric([namespace], used.gpu_seconds)
        tokens.add_metric([namespace], used.trained_tokens)
    yield from (seconds, tokens)


_WHILE_IT_RUNS = frozenset(
    f"finetune_job_{name}"
    for name in (
        "workers_wanted",
        "workers_ready",
        "queue_wait_seconds",
        "startup_duration_seconds",
        "eta_seconds",
        "progress_timestamp_seconds",
        "checkpoint_step",
    )
)
"""Left out of a job whose published model is measured again: it makes room for what is told of that."""


class JobCollector(Collector):
    """The series of all jobs, made from their latest statuses when they are asked for."""

    def __init__(self, exposed: Callable[[], bool], clock: Callable[[], float] = time.time) -> None:
        self._exposed, self._clock = exposed, clock
        self._jobs: dict[str, dict[str, Any]] = {}
        self._completed: Counter[str] = Counter()
        """Namespace to jobs that were seen to complete."""
        self._failed: Counter[tuple[str, str]] = Counter()
        """Namespace and reason to jobs that were seen to fail."""
        self._totals = UsageTotals()

    def see(self, job: Mapping[str, Any], gone: bool) -> None:
        """Take note of a job as it is now. Only what the series need is kept."""
        meta = job["metadata"]
        self._totals.see(job)
        if gone:
            self._jobs.pop(meta["uid"], None)
            return
        spec = {part: job.get("spec", {}).get(part) or {} for part in ("model", "method", "objective")}
        kept = {"metadata": {name: meta.get(name) for name in ("namespace", "name", "uid", "labels")}, "spec": spec}
        before, status = self._jobs.get(meta["uid"]), job.get("status") or {}
        self._jobs[meta["uid"]] = {**kept, "status": status}
        if before is not None and not _ending(before["status"]):
            self._count(meta["namespace"], _ending(status))

    def keep(self, uids: Collection[str]) -> None:
        """Forget jobs other than these: of one deleted while the watch was down nobody tells."""
        for uid in self._jobs.keys() - set(uids):
            del self._jobs[uid]
        self._totals.keep(uids)

    def collect(self) -> Iterator[Metric]:
        """One metric per family. Only the leader tells of jobs, so that a sum over replicas counts each once."""
        metrics = [family.metric() for family in FAMILIES]
        phases: Counter[tuple[str, str]] = Counter()
        now = self._clock()
        for job in self._jobs.values() if self._exposed() else ():
            where = (job["metadata"]["namespace"], job["metadata"]["name"])
            try:
                seen = Seen(job, Status.model_validate(job["status"]), now)
            except ValidationError:  # of another version of the operator: one job must not take the series of all others away
                continue
            phases[where[0], seen.status.phase or "Pending"] += 1
            for family, metric in zip(FAMILIES, metrics, strict=True):
                if seen.status.monitoring is not None and family.name in _WHILE_IT_RUNS:
                    continue
                for labels, value in family.samples(seen):
                    metric.add_metric([*where, *labels], value)  # type: ignore[attr-defined]
        yield from metrics
        yield from self._sums(phases) if self._exposed() else _no_sums()
        yield from _namespaces(self._totals if self._exposed() else ())

    def describe(self) -> Iterator[Metric]:
        """The families, without samples."""
        yield from (family.metric() for family in FAMILIES)
        yield from _no_sums()  # whether this replica leads is not known yet when it is asked for these
        yield from _namespaces(())

    def _count(self, namespace: str, ending: tuple[str, str] | None) -> None:
        if ending is not None and ending[0] == "Complete":
            self._completed[namespace] += 1
        elif ending is not None:
            self._failed[namespace, closed(ending[1])] += 1

    def _sums(self, phases: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
        """What is told of namespaces rather than of jobs."""
        jobs, completed, failed = _no_sums()
        for (namespace, phase), count in phases.items():
            jobs.add_metric([namespace, phase], count)
        for namespace, count in self._completed.items():
            completed.add_metric([namespace], count)
        for (namespace, reason), count in self._failed.items():
            failed.add_metric([namespace, reason], count)
        yield from (jobs, completed, failed)


def _no_sums() -> tuple[GaugeMetricFamily, CounterMetricFamily, CounterMetricFamily]:
    """The families that are told of namespaces, without samples."""
    return (
        GaugeMetricFamily("finetune_jobs", "Jobs by phase.", labels=["namespace", "phase"]),
        CounterMetricFamily("finetune_job_completed", "Jobs that this replica saw complete.", labels=["namespace"]),
        CounterMetricFamily("finetune_job_failed", "Jobs that this replica saw fail for good, by reason.", labels=["namespace", "reason"]),
    )


def _ending(status: Mapping[str, Any]) -> tuple[str, str] | None:
    """The condition by which a job has ended and its reason, read from the raw status."""
    for condition in status.get("conditions") or ():
        if condition.get("type") in ("Complete", "Failed") and condition.get("status") == "True":
            return str(condition["type"]), str(condition.get("reason", ""))
    return None
