"""Prometheus: what the operator does, beside what `job_series` tells of the jobs."""

import asyncio
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from finetune_operator.job_series import JobCollector
from finetune_operator.port import ApiError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_TICK_SECONDS = 1.0
LAG_TICKS = 60
"""The lag that is told is the longest of so many ticks: one that came and went between two scrapes is seen, too."""
_API_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15)
_RECONCILE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


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
        self._last_event = self._gauge(
            "watch_last_event_timestamp_seconds", "When the watch last told of an object of this resource, Unix time.", "resource"
        )
        self._lags: deque[float] = deque([0.0], maxlen=LAG_TICKS)
        lag = self._gauge("event_loop_lag_seconds", f"How late the event loop was at most in the last {LAG_TICKS} seconds.")
        lag.set_function(lambda: max(self._lags))
        self._reconciles = self._counter("reconcile", "Reconciles, by result: done or error.", "result")
        self._errors = self._counter(
            "reconcile_errors", "Reconciles that ended with an error: the API server's HTTP status, NoAnswer, or Defect.", "reason"
        )
        self._duration = self._histogram(
            "reconcile_duration_seconds", "Time of a reconcile, in which a head's report may be waited for.", _RECONCILE_BUCKETS
        )
        self._requests = self._counter("api_requests", "Requests to the API server; code 0 is no answer.", "verb", "code")
        self._request_duration = self._histogram(
            "api_request_duration_seconds", "Time of a request to the API server, tries in between included.", _API_BUCKETS, "verb"
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"finetune_operator_{name}", text, labels, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"finetune_operator_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"finetune_operator_{name}", text, labels, buckets=buckets, registry=self._registry)

    def api_request(self, verb: str, code: int, seconds: float) -> None:
        """Count and time one request to the API server."""
        self._requests.labels(verb, str(code)).inc()
        self._request_duration.labels(verb).observe(seconds)

    def watched(self, resource: str) -> None:
        """The watch has told of an object of this resource."""
        self._last_event.labels(resource).set(time.time())

    @contextmanager
    def reconcile(self) -> Iterator[None]:
        """Count and time one reconcile."""
        start = perf_counter()
        try:
            yield
        except Exception as error:
            self._reconciles.labels("error").inc()
            self._errors.labels(_error_reason(error)).inc()
            raise
        else:
            self._reconciles.labels("done").inc()
        finally:
            self._duration.observe(perf_counter() - start)

    async def follow_lag(self) -> None:
        """Measure how late the event loop wakes who sleeps, until cancelled."""
        while True:
            due = time.monotonic() + LAG_TICK_SECONDS
            await asyncio.sleep(LAG_TICK_SECONDS)
            self._lags.append(max(0.0, time.monotonic() - due))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


def _error_reason(error: Exception) -> str:
    """One of a closed set of words: statuses of HTTP are few, and everything else is a defect."""
    if not isinstance(error, ApiError):
        return "Defect"
    return f"Http{error.status}" if error.status else "NoAnswer"
