"""The operator as a process: settings from the environment, logs, probes, leader election, and the orderly end.

Exit codes: 0 after SIGTERM or SIGINT, 2 where the environment is wrong, 1 for everything else; Kubernetes starts it again then,
and nothing is lost, since nothing is remembered.
"""

import asyncio
import contextlib
import gc
import logging
import math
import os
import random
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import structlog
from aiohttp import web
from kubernetes.aio.config import ConfigException
from prometheus_client import disable_created_metrics

from finetune_operator.clock import Clock
from finetune_operator.cluster import KubernetesCluster, connect
from finetune_operator.election import LEASE_SECONDS, Election
from finetune_operator.handlers import informer_registry, start_informer
from finetune_operator.metrics import CONTENT_TYPE, Metrics
from finetune_operator.port import ApiError, JobKey
from finetune_operator.queue import LISTED_PATIENCE_SECONDS, Queue
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import Settings, settings_from
from finetune_operator.survey import survey

EXIT_ENVIRONMENT = 2
STUCK_SECONDS = 180.0
"""A reconcile that takes so long is stuck: each of its calls has a limit of seconds."""
READY_SECONDS = 3.0
"""Longest wait for the API server when /readyz asks whether it can be reached."""
READY_FRESH_SECONDS = 2.0
"""How long its answer holds: anyone in the cluster may ask for /readyz, and must not make as many requests of the API server."""
CRD_RETRY_SECONDS = 5.0
WATCH_RETRY_SECONDS = 5.0
"""Between a watch that broke down and the next: each lists everything."""
RESYNC_SECONDS = 600.0
"""How often every job that does not rest gets a turn whatever happens. A watch that breaks may miss a deletion."""

log = structlog.get_logger("finetune_operator")


def main() -> NoReturn:
    """Run the operator until it is told to stop."""
    try:
        settings = settings_from(os.environ)
        configure_logs(settings.log_level)
    except ValueError as error:
        print(f"finetune-operator: {error}", file=sys.stderr)  # noqa: T201 - logs are not set up yet
        sys.exit(EXIT_ENVIRONMENT)
    gc.freeze()  # what has been imported stays: it need not be looked through at each collection
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        asyncio.run(Operator(settings).run())
    except ConfigException as error:
        log.error("no Kubernetes to work with: set KUBECONFIG, or run in a pod", error=str(error))
        sys.exit(EXIT_ENVIRONMENT)
    except Exception:
        log.exception("the operator ends after an error")
        sys.exit(1)
    sys.exit(0)


class Operator:
    """One replica."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.queue = Queue(self._reconcile, settings.max_concurrent)
        self.election: Election | None = None
        self.metrics = Metrics(installed_version(), depth=lambda: len(self.queue), leading=self._leads)
        self._clock = Clock()
        self._begun: dict[JobKey, float] = {}
        """Reconciles that run, and when they began (monotonic)."""
        self._listed: set[JobKey] = set()
        """Jobs that have yet to take the turn that every job is given."""
        self._watching = False
        self._asking = asyncio.Lock()
        self._answer = (-math.inf, "")
        """When the API server was last asked for /readyz (monotonic), and what was wrong then."""
        self._cluster: KubernetesCluster

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT. Raises where a part of the operator fails."""
        stop = asyncio.Event()
        async with (
            connect(
                self.settings.report_port, self.metrics.api_request, self.settings.gang_scheduler, poll_seconds=self.settings.poll_seconds
            ) as self._cluster,
            self._http_server(),
        ):
            if self.settings.leader_election:
                identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
                self.election = Election(self._cluster.client, self.settings.operator_namespace, identity)
            # SIGTERM also counts while the CRD is not there yet.
            _on_signals(stop)
            tasks = [asyncio.create_task(part) for part in (self._watch(stop), self._resync(), self._work(), self.metrics.follow_lag())]
            if self.election:
                tasks.append(asyncio.create_task(self.election.run(_lost_lead)))
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
                log.info("stopping", reason="signal" if stop.is_set() else "a part of the operator has ended")
            finally:
                await _end(stopping, *reversed(tasks))
                if self.election:
                    await self.election.release()
            for task in tasks:
                if not task.cancelled():
                    task.result()  # raises what ended it
            if not stop.is_set():
                raise RuntimeError("a part of the operator has ended without a reason")

    async def _work(self) -> None:
        """The queue's turn comes with the lead."""
        if self.election:
            await self.election.leading.wait()
        await self.queue.run()

    async def _watch(self, stop: asyncio.Event) -> None:
        """Watch. A watch that breaks down, as for an answer that kopf cannot use, is begun anew: all is listed, so nothing is lost."""
        while True:
            await self._until_served()
            registry = informer_registry(self._wake, self.metrics.jobs.see, self._cluster.login, self.metrics.watched)
            watch = await start_informer(registry, self.settings.watch_namespaces)
            _on_signals(stop)  # kopf has just taken them
            self._watching = True
            log.info("watching", namespaces=self.settings.watch_namespaces or "all")
            try:
                await watch()
                return
            except Exception as error:
                log.warning("the watch broke down and is begun anew", error=repr(error))
            finally:
                self._watching = False
            await asyncio.sleep(WATCH_RETRY_SECONDS)

    async def _until_served(self) -> None:
        """Wait until there is something to watch: kopf would not notice a CRD that comes later."""
        while True:
            try:
                await self._cluster.check(self.settings.watch_namespaces)
                return
            except ApiError as error:
                log.warning("waiting for the API server, the CRD and the permission to list jobs", error=str(error))
                await asyncio.sleep(CRD_RETRY_SECONDS)

    def _wake(self, key: JobKey, happened: bool) -> None:
        """A replica that stands by queues nothing: nobody would take it off the queue again, not even when the job is gone."""
        if self._leads():
            self.queue.add(key, patience=0.0 if happened else LISTED_PATIENCE_SECONDS)

    async def _resync(self) -> None:
        """Give every job that does not rest a turn from time to time, and when the lead comes."""
        if self.election:
            await self.election.leading.wait()
        while True:
            try:
                keys, resting = await survey(self._cluster, self.settings.watch_namespaces)
            except ApiError as error:
                log.warning("the jobs could not be listed", error=str(error))
                await asyncio.sleep(CRD_RETRY_SECONDS)
                continue
            self.metrics.jobs.keep(keys)
            self._give_turns(keys, resting)
            await asyncio.sleep(RESYNC_SECONDS)

    def _give_turns(self, jobs: Mapping[str, JobKey], resting: Collection[str]) -> None:
        """A turn for each of these jobs, but for those that rest: there would be nothing to do."""
        due = [key for uid, key in jobs.items() if uid not in resting]
        log.info("the jobs are listed", jobs=len(jobs), resting=len(jobs) - len(due))
        self._listed.update(due)
        for key in due:
            self.queue.add(key, patience=LISTED_PATIENCE_SECONDS)

    async def _reconcile(self, key: JobKey) -> float | None:
        with structlog.contextvars.bound_contextvars(namespace=key.namespace, job=key.name), self.metrics.reconcile():
            self._begun[key] = time.monotonic()
            try:
                delay = await reconcile(key, self._cluster, self.settings, self._clock.now(), self._clock.set_time)
            finally:
                del self._begun[key]
            share = self._share(key)
            return None if delay is None else delay * share

    def _share(self, key: JobKey) -> float:
        """By how much the next turn comes early after one that every job was given: else all of them would come due together ever after."""
        if key not in self._listed:
            return 1.0
        self._listed.discard(key)
        return random.random()  # noqa: S311 - nobody gains by knowing it

    def _leads(self) -> bool:
        return self.election is None or self.election.leading.is_set()

    @contextlib.asynccontextmanager
    async def _http_server(self) -> AsyncIterator[None]:
        app = web.Application()
        app.add_routes([web.get("/healthz", self._healthz), web.get("/readyz", self._readyz), web.get("/metrics", self._metrics)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, port=self.settings.http_port).start()
            yield
        finally:
            await runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        """Alive: the event loop turns (it answers), no reconcile is stuck, and a leader has renewed its Lease."""
        now = time.monotonic()
        stuck = [f"{key.namespace}/{key.name}" for key, begun in self._begun.items() if now - begun > STUCK_SECONDS]
        if stuck:
            return web.Response(status=500, text=f"reconcile stuck: {', '.join(stuck[:10])}\n")
        if self.election and self.election.leading.is_set() and self.election.seconds_since_contact > LEASE_SECONDS:
            return web.Response(status=500, text=f"the Lease was not renewed for {self.election.seconds_since_contact:.0f} s\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        """Ready: the watch is up and the API server answers, whether this replica leads or stands by."""
        if not self._watching:
            return web.Response(status=503, text="not watching yet\n")
        async with self._asking:
            if time.monotonic() - self._answer[0] > READY_FRESH_SECONDS:
                problem = await self._unreachable()
                self._answer = (time.monotonic(), problem)
        problem = self._answer[1]
        if problem:
            return web.Response(status=503, text=f"the API server does not answer: {problem}\n")
        return web.Response(text="leads\n" if self._leads() else "stands by\n")

    async def _unreachable(self) -> str:
        """Why the API server cannot be worked with; empty where it can."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._cluster.check(self.settings.watch_namespaces)
        except (ApiError, TimeoutError) as error:
            return str(error) or "not in time"
        return ""

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


def _on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks one after the other, and wait for each."""
    for task in tasks:
        task.cancel()
        await asyncio.wait([task])


def _lost_lead() -> NoReturn:
    """Another replica may lead from now on, so nothing more may be written: not even an orderly end is left time for."""
    log.error("the lead is lost: the Lease could not be renewed in time")
    sys.stdout.flush()
    os._exit(1)


def installed_version() -> str:
    """Version of the installed distribution; "unknown" where the code runs from a folder that was never installed."""
    try:
        return version("finetune-operator")
    except PackageNotFoundError:
        return "unknown"


def configure_logs(level: str) -> None:
    """One JSON object per line on standard output, from every library too, with the job that the line is about.

    Raises ValueError for a level that there is not.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"FINETUNE_LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not {level!r}")
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.PositionalArgumentsFormatter(), structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    main()
