"""Prometheus: what the operator does, and the state of every job as its latest status has it.

The series of jobs are made from the statuses at each scrape, so a job that is gone leaves none behind, and a restart loses nothing.
A job has at most SERIES_PER_JOB series; no label holds free text.
"""

import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import perf_counter
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.fields import METRIC_PATTERN
from finetune_api.methods import METHODS
from finetune_api.objectives import OBJECTIVES
from finetune_api.status import Phase, Status, Verdict

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERIES_PER_JOB = 120
RESULTS_SHOWN = 24
"""A job may have more measures than a monitoring system should have series of it."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PHASES: tuple[str, ...] = get_args(Phase)
VERDICTS: tuple[str, ...] = get_args(Verdict)

Sample = tuple[tuple[str, ...], float]
"""Values of a family's labels beyond namespace and name, and the sample's value."""


@dataclass(frozen=True)
class _Family:
    """One metric of jobs and where its samples come from."""

    name: str
    help: str
    samples: Callable[[Mapping[str, Any], Status], Iterable[Sample]]
    labels: tuple[str, ...] = ()
    counter: bool = False

    def metric(self) -> Metric:
        family = CounterMetricFamily if self.counter else GaugeMetricFamily
        metric: Metric = family(self.name, self.help, labels=("namespace", "name", *self.labels))
        return metric


def _value(read: Callable[[Status], float | None]) -> Callable[[Mapping[str, Any], Status], Iterable[Sample]]:
    def samples(job: Mapping[str, Any], status: Status) -> Iterator[Sample]:
        value = read(status)
        if value is not None:
            yield (), float(value)

    return samples


def _measure(name: str) -> Callable[[Mapping[str, Any], Status], Iterable[Sample]]:
    return _value(lambda status: next((metric.value for metric in status.metrics if metric.name == name), None))


def _seconds(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None


def _info(job: Mapping[str, Any], _: Status) -> Iterator[Sample]:
    spec, labels = job.get("spec", {}), job["metadata"].get("labels") or {}
    method = next((name for name in METHODS if name in spec.get("method", {})), "")
    objective = next((name for name in OBJECTIVES if name in spec.get("objective", {})), "")
    yield (job["metadata"]["uid"], method, objective, spec.get("model", {}).get("source", ""), labels.get(QUEUE_LABEL, "")), 1.0


def _phases(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    for phase in PHASES:
        yield (phase,), float(phase == status.phase)


def _failed(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    failed = next((condition for condition in status.conditions if condition.type == "Failed" and condition.status == "True"), None)
    if failed:
        yield (failed.reason,), 1.0


def _test_loss(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    for result in status.evaluation.results if status.evaluation else ():
        if result.metric == "test/loss":
            for model, value in (("base", result.baseline), ("tuned", result.value)):
                if value is not None:
                    yield (model,), value


def _evaluation(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    """The tuned model's value, and the untuned one's, of the first metrics of the suites. The names are those of a tenant's pod."""
    results = status.evaluation.results if status.evaluation else ()
    named = [result for result in results if re.fullmatch(METRIC_PATTERN, result.metric)]
    for result in named[:RESULTS_SHOWN]:
        for model, value in (("base", result.baseline), ("tuned", result.value)):
            if value is not None:
                yield (result.metric, model), value


def _gates(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    gates = status.evaluation.gates if status.evaluation else ()
    for verdict in VERDICTS if gates else ():
        yield (verdict,), float(sum(gate.verdict == verdict for gate in gates))


def _trials(_: Mapping[str, Any], status: Status) -> Iterator[Sample]:
    if status.search:
        counts = {"completed": status.search.completed, "failed": status.search.failed, "pruned": status.search.pruned}
        yield from (((state,), float(count)) for state, count in counts.items())


def _progress(read: Callable[[Any], float | None]) -> Callable[[Mapping[str, Any], Status], Iterable[Sample]]:
    return _value(lambda status: read(status.progress) if status.progress else None)


FAMILIES: tuple[_Family, ...] = (
    _Family("finetune_job_info", "A job; always 1.", _info, labels=("uid", "method", "objective", "base_model", "queue")),
    _Family("finetune_job_status_phase", "1 for the phase that the job is in, 0 for the others.", _phases, labels=("phase",)),
    _Family("finetune_job_failed", "1 for a job that has failed for good, with the reason.", _failed, labels=("reason",)),
    _Family("finetune_job_start_timestamp_seconds", "When the operator first acted on the job.", _value(lambda s: _seconds(s.start_time))),
    _Family("finetune_job_completion_timestamp_seconds", "When the job ended.", _value(lambda s: _seconds(s.completion_time))),
    _Family("finetune_job_attempt", "Number of the current attempt.", _value(lambda s: s.attempt.number)),
    _Family("finetune_job_failures", "Attempts that failed.", _value(lambda s: s.attempt.failures), counter=True),
    _Family("finetune_job_preemptions", "Attempts that the cluster took away.", _value(lambda s: s.attempt.preemptions), counter=True),
    _Family("finetune_job_lost_steps", "Optimiser steps that had to be done again.", _value(lambda s: s.attempt.lost_steps), counter=True),
    _Family("finetune_job_workers_wanted", "Worker pods that the current stage needs.", _value(lambda s: s.workers_wanted)),
    _Family("finetune_job_workers_ready", "Worker pods that are ready.", _value(lambda s: s.workers_ready)),
    _Family(
        "finetune_job_gpu_seconds", "GPUs held, times seconds.", _value(lambda s: s.usage.gpu_seconds if s.usage else None), counter=True
    ),
    _Family(
        "finetune_training_tokens",
        "Tokens of examples that steps were taken on.",
        _value(lambda s: s.usage.trained_tokens if s.usage else None),
        counter=True,
    ),
    _Family("finetune_training_step", "Optimiser steps done.", _progress(lambda p: p.step)),
    _Family("finetune_training_steps_planned", "Optimiser steps in all.", _progress(lambda p: p.total_steps)),
    _Family("finetune_training_epoch", "Epochs done.", _progress(lambda p: p.epoch)),
    _Family("finetune_training_progress_ratio", "Share of the steps that is done.", _progress(lambda p: p.percent / 100)),
    _Family(
        "finetune_training_tokens_per_second", "Tokens of examples per second, over all workers.", _progress(lambda p: p.tokens_per_second)
    ),
    _Family("finetune_training_eta_seconds", "Estimated time to the end of the training.", _progress(lambda p: p.eta_seconds)),
    _Family(
        "finetune_training_heartbeat_timestamp_seconds",
        "When the trainer last reported.",
        _progress(lambda p: _seconds(p.last_update_time)),
    ),
    _Family("finetune_training_loss", "Latest training loss.", _measure("train/loss")),
    _Family("finetune_training_eval_loss", "Latest validation loss.", _measure("validation/loss")),
    _Family(
        "finetune_training_checkpoint_step",
        "Optimiser step of the newest complete checkpoint.",
        _value(lambda s: s.checkpoints.latest.step if s.checkpoints and s.checkpoints.latest else None),
    ),
    _Family("finetune_evaluation_test_loss", "Test loss of the untuned and of the tuned model.", _test_loss, labels=("model",)),
    _Family(
        "finetune_job_evaluation",
        f"Measures of the untuned and of the tuned model, the first {RESULTS_SHOWN} of a job.",
        _evaluation,
        labels=("metric", "model"),
    ),
    _Family("finetune_job_gates", "Gates by verdict.", _gates, labels=("verdict",)),
    _Family("finetune_job_search_trials", "Trials of the search that have ended, by how.", _trials, labels=("state",)),
)


class JobCollector(Collector):
    """The series of all jobs, made from their latest statuses when they are asked for."""

    def __init__(self, exposed: Callable[[], bool]) -> None:
        self._exposed = exposed
        self._jobs: dict[str, dict[str, Any]] = {}

    def see(self, job: Mapping[str, Any], gone: bool) -> None:
        """Take note of a job as it is now. Only what the series need is kept."""
        meta = job["metadata"]
        if gone:
            self._jobs.pop(meta["uid"], None)
            return
        spec = {part: job.get("spec", {}).get(part) or {} for part in ("model", "method", "objective")}
        kept = {"metadata": {name: meta.get(name) for name in ("namespace", "name", "uid", "labels")}, "spec": spec}
        self._jobs[meta["uid"]] = {**kept, "status": job.get("status") or {}}

    def keep(self, uids: Collection[str]) -> None:
        """Forget jobs other than these: of one deleted while the watch was down nobody tells."""
        for uid in self._jobs.keys() - set(uids):
            del self._jobs[uid]

    def collect(self) -> Iterator[Metric]:
        """One metric per family. Only the leader tells of jobs, so that a sum over replicas counts each once."""
        metrics = [family.metric() for family in FAMILIES]
        for job in self._jobs.values() if self._exposed() else ():
            where = (job["metadata"]["namespace"], job["metadata"]["name"])
            try:
                status = Status.model_validate(job["status"])
            except ValidationError:  # of another version of the operator: one job must not take the series of all others away
                continue
            for family, metric in zip(FAMILIES, metrics, strict=True):
                for labels, value in family.samples(job, status):
                    metric.add_metric([*where, *labels], value)  # type: ignore[attr-defined]
        yield from metrics

    def describe(self) -> Iterator[Metric]:
        """The families, without samples."""
        return (family.metric() for family in FAMILIES)


class Metrics:
    """Everything that /metrics tells."""

    def __init__(self, version: str, depth: Callable[[], float], leading: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self.jobs = JobCollector(exposed=leading)
        self._registry.register(self.jobs)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        build = self._gauge("build_info", "The operator that runs; always 1.", "version", "python")
        build.labels(version, platform.python_version()).set(1)
        self._gauge("workqueue_depth", "Jobs that wait for their turn.").set_function(depth)
        self._gauge("leader", "1 for the replica that works, 0 for one that stands by.").set_function(lambda: float(leading()))
        self._reconciles = Counter(
            "finetune_operator_reconcile", "Reconciles, by result: done or error.", ["result"], registry=self._registry
        )
        self._duration = Histogram(
            "finetune_operator_reconcile_duration_seconds",
            "Time of a reconcile, in which a head's report may be waited for.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self._registry,
        )
        self._requests = Counter(
            "finetune_operator_api_requests", "Requests to the API server; code 0 is no answer.", ["verb", "code"], registry=self._registry
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"finetune_operator_{name}", text, labels, registry=self._registry)

    def api_request(self, verb: str, code: int) -> None:
        """Count one request to the API server."""
        self._requests.labels(verb, str(code)).inc()

    @contextmanager
    def reconcile(self) -> Iterator[None]:
        """Count and time one reconcile."""
        start = perf_counter()
        try:
            yield
        except Exception:
            self._reconciles.labels("error").inc()
            raise
        else:
            self._reconciles.labels("done").inc()
        finally:
            self._duration.observe(perf_counter() - start)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
