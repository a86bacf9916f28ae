"""The one way out of the head: GET /report for the operator, PUT /progress for the workers, /metrics for Prometheus, lines for people.

The report is one frozen value that is replaced, never changed; `revision` grows when the operator should act at once.
"""

import asyncio
import hmac
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import ValidationError

from finetune_api.report import Outcome, Report
from finetune_api.status import STAGES, Failure, Stage, StageName, StageState
from finetune_trainer.pace import Goodput
from finetune_trainer.progress import Answer, WorkerProgress, utc_now
from finetune_trainer.training_series import PREFIX, Workers, running_stage, series

LONGEST_WAIT_SECONDS = 60.0
LARGEST_BODY_BYTES = 64 * 1024
LATELY_SECONDS = 60.0
"""Whoever has not asked for the report for so long does not follow it."""


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
        self._read = threading.Condition()
        self._read_revision, self._read_at = 0, -math.inf
        self._registry = CollectorRegistry()
        self._collector = ReportCollector(reporter)
        self._registry.register(self._collector)
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

    def wait_read(self, seconds: float) -> bool:
        """Wait until somebody has read the newest report: no longer than so, and not at all where nobody follows it.

        Returns whether it was read. A termination message has no room for all that a report says.
        """
        newest = self._reporter.report.revision
        with self._read:
            if time.monotonic() - self._read_at > LATELY_SECONDS:
                return False
            return self._read.wait_for(lambda: self._read_revision >= newest, timeout=seconds)

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
            report = self._reporter.report
            if report.revision > after or left <= 0:
                with self._read:
                    self._read_revision, self._read_at = report.revision, time.monotonic()
                    self._read.notify_all()
                return web.json_response(report.to_json())
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
        self._collector.take(progress)
        return web.json_response(asdict(self._on_progress(progress)))

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class ReportCollector(Collector):
    """The report as Prometheus's series: read at each scrape, so that none outlives what it tells of."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._workers: Callable[[], Workers] = Workers
        self._goodput = Goodput(time.monotonic)

    def take(self, progress: WorkerProgress) -> None:
        """Take what the workers say beyond what becomes the report."""
        if progress.pace is None or progress.start_step is None:
            return
        self._goodput.take(progress.group, progress.start_step, progress.step, progress.pace.stepping_seconds)
        pace, processes = progress.pace, progress.processes
        self._workers = lambda: Workers(pace, processes, self._goodput.ratio)

    def collect(self) -> Iterator[Metric]:
        """One family for each number that is known, and the stage."""
        report = self._reporter.report
        for known in series(report, self._workers()):
            if known.value is not None:
                family = CounterMetricFamily if known.kind == "counter" else GaugeMetricFamily
                yield family(PREFIX + known.name, known.help, value=known.value)
        stage = GaugeMetricFamily(f"{PREFIX}stage", "1 for the stage that runs.", labels=["stage"])
        if running := running_stage(report):
            stage.add_metric([running], 1)
        yield stage
