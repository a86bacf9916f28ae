"""The one way out of the head: GET /report for the operator, PUT /progress for the workers, /metrics for Prometheus, lines for people.

The report is one frozen value that is replaced, never changed; `revision` grows when the operator should act at once.
"""

import asyncio
import hmac
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.report import Outcome, Report
from finetune_api.status import STAGES, Failure, Stage, StageName, StageState
from finetune_trainer.progress import Answer, WorkerProgress

LONGEST_WAIT_SECONDS = 60.0
LARGEST_BODY_BYTES = 64 * 1024


def utc_now() -> str:
    """The time in UTC, RFC 3339, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Reporter:
    """Holds the newest report. Safe to use from any thread."""

    def __init__(self, job_uid: str, attempt: int, *, stages: tuple[StageName, ...] = STAGES, clock: Callable[[], str] = utc_now) -> None:
        self._clock, self._stages = clock, stages
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], object]] = []
        self._report = Report(
            job_uid=job_uid, attempt=attempt, revision=1, stages=tuple(Stage(name=name, state="Pending") for name in stages)
        )

    @property
    def report(self) -> Report:
        """The newest report."""
        return self._report

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called, in the changing thread, after each change that grew the revision."""
        self._listeners.append(listener)

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Report
        """Replace fields that the operator reads when it looks next."""
        with self._lock:
            self._report = self._report.model_copy(update=changes)

    def announce(self, **changes: Any) -> None:  # noqa: ANN401 - fields of Report
        """Replace fields that the operator should see at once."""
        with self._lock:
            self._report = self._report.model_copy(update={**changes, "revision": self._report.revision + 1})
        for listener in self._listeners:
            listener()

    def start_stage(self, name: StageName, message: str, *, workers_wanted: int) -> None:
        """End the stage before as succeeded and begin this one."""
        now, before = self._clock(), self._stages[: self._stages.index(name)]
        stages = tuple(
            Stage(name=name, state="Running", start_time=stage.start_time or now)
            if stage.name == name
            else _ended(stage, "Succeeded", now)
            if stage.name in before
            else stage
            for stage in self._report.stages
        )
        self.announce(stages=stages, message=message, workers_wanted=workers_wanted)

    def finish(self, outcome: Outcome, message: str, failure: Failure | None = None) -> None:
        """End the attempt. A stage that runs ends as succeeded or failed; interrupted, it stays as it is for the next attempt."""
        state: StageState | None = {"Succeeded": "Succeeded", "Failed": "Failed"}.get(outcome)  # type: ignore[assignment]
        now = self._clock()
        stages = tuple(_ended(stage, state, now) if state and stage.state == "Running" else stage for stage in self._report.stages)
        self.announce(stages=stages, outcome=outcome, message=message, failure=failure, workers_wanted=0)


def _ended(stage: Stage, state: StageState, now: str) -> Stage:
    """The stage with its end; one that has ended keeps its time."""
    return stage if stage.end_time else Stage(name=stage.name, state=state, start_time=stage.start_time or now, end_time=now)


class ReportServer:
    """The HTTP server, in a thread of its own.

    `on_progress` takes what the workers tell and answers what they should do.
    """

    def __init__(self, reporter: Reporter, token: str, port: int, on_progress: Callable[[WorkerProgress], Answer]) -> None:
        self._reporter, self._token, self._port, self._on_progress = reporter, token, port, on_progress
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._registry = CollectorRegistry()
        self._registry.register(ReportCollector(reporter))
        self._thread = threading.Thread(target=self._loop.run_forever, name="report", daemon=True)

    def start(self) -> None:
        """Listen on every address. Raises OSError where the port is taken."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=30)
        self._reporter.listen(lambda: self._loop.call_soon_threadsafe(self._wake))

    def stop(self) -> None:
        """Stop listening."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    async def _listen(self) -> None:
        app = web.Application(client_max_size=LARGEST_BODY_BYTES)
        app.add_routes(
            [
                web.get("/report", self._get_report),
                web.put("/progress", self._put_progress),
                web.get("/healthz", self._get_health),
                web.get("/metrics", self._get_metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, None, self._port).start()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _check_token(self, request: web.Request) -> None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise web.HTTPUnauthorized(text="a bearer token is needed\n")

    async def _get_report(self, request: web.Request) -> web.Response:
        """The report: at once where its revision is above `after`, else when that happens or `wait` seconds have passed."""
        self._check_token(request)
        try:
            after, wait = int(request.query.get("after", -1)), min(float(request.query.get("wait", 0)), LONGEST_WAIT_SECONDS)
        except ValueError:
            raise web.HTTPBadRequest(text="after and wait must be numbers\n") from None
        if math.isnan(wait):
            raise web.HTTPBadRequest(text="wait must be a number\n")
        deadline = self._loop.time() + wait
        while True:
            changed = self._changed
            left = deadline - self._loop.time()
            if self._reporter.report.revision > after or left <= 0:
                return web.json_response(self._reporter.report.to_json())
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                continue

    async def _put_progress(self, request: web.Request) -> web.Response:
        self._check_token(request)
        try:
            progress = WorkerProgress.model_validate_json(await request.read())
        except ValidationError as error:
            raise web.HTTPBadRequest(text=f"{error.error_count()} fields are wrong\n") from None
        return web.json_response(asdict(self._on_progress(progress)))

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class ReportCollector(Collector):
    """The report as Prometheus gauges: read at each scrape, so that no series outlives what it tells of."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        """One family for each number that the report holds."""
        for name, (description, value) in gauges(self._reporter.report).items():
            if value is not None:
                yield GaugeMetricFamily(f"finetune_training_{name}", description, value=value)
        states = GaugeMetricFamily("finetune_training_stage", "1 for the state that the stage is in.", labels=["stage", "state"])
        for stage in self._reporter.report.stages:
            states.add_metric([stage.name, stage.state], 1)
        yield states


def gauges(report: Report) -> dict[str, tuple[str, float | None]]:
    """Name without prefix to description and value; None is left out."""
    progress, usage, latest = report.progress, report.usage, report.checkpoints.latest if report.checkpoints else None
    metrics = {metric.name: metric.value for metric in report.metrics}
    return {
        "attempt": ("The job's attempt that this is.", report.attempt),
        "workers_wanted": ("Worker pods that the stage needs.", report.workers_wanted),
        "step": ("Optimiser steps done.", progress.step if progress else None),
        "steps_planned": ("Optimiser steps in all.", progress.total_steps if progress else None),
        "epoch": ("Epochs done.", progress.epoch if progress else None),
        "progress_ratio": ("Share of the steps that is done.", progress.step / max(1, progress.total_steps) if progress else None),
        "tokens_per_second": ("Tokens of examples per second, over all workers.", progress.tokens_per_second if progress else None),
        "eta_seconds": ("Estimated time to the end of the training.", progress.eta_seconds if progress else None),
        "heartbeat_timestamp_seconds": (
            "When the workers last reported, Unix time.",
            _unix(progress.last_update_time) if progress else None,
        ),
        "loss": ("Training loss of the latest step, nats per token.", metrics.get("train/loss")),
        "validation_loss": ("Validation loss, nats per token.", metrics.get("validation/loss")),
        "learning_rate": ("Learning rate of the latest step.", metrics.get("train/learningRate")),
        "grad_norm": ("Norm of the gradients before clipping.", metrics.get("train/gradNorm")),
        "lost_steps": ("Steps that had to be done again.", report.lost_steps),
        "checkpoint_step": ("Step of the newest complete checkpoint.", latest.step if latest else None),
        "trained_tokens": ("Tokens of examples that this attempt took steps on.", usage.trained_tokens if usage else None),
        "gpu_seconds": ("GPUs held by this attempt, times seconds.", usage.gpu_seconds if usage else None),
    }


def _unix(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None
