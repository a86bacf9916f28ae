"""Leader election by a Lease: of several replicas at most one works; the others stand by.

The official client's election does the work. What is added here: time limits (its calls may hang longer than the Lease lasts),
a network that fails counts as a call that failed, the moment of the last renewal for /healthz, a clock that may be set, and a Lease that is
given back at the end.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from finetune_operator.clock import Clock

LEASE_NAME = "finetune-operator"
LEASE_SECONDS = 15
"""A leader that has not renewed for so long may be succeeded."""
RENEW_SECONDS = 10
"""A leader that could not renew for so long stops. Its last attempt may take two calls more, and still ends before LEASE_SECONDS."""
RETRY_SECONDS = 2
CALL_SECONDS = 2.0

log = logging.getLogger(__name__)


class Election:
    """One replica's part in the election."""

    def __init__(self, client: ApiClient, namespace: str, identity: str) -> None:
        self._lock = _Lock(LEASE_NAME, namespace, identity, client)
        self.leading = asyncio.Event()
        """Set while this replica leads."""

    @property
    def seconds_since_contact(self) -> float:
        """Time since the Lease could last be read or written."""
        return time.monotonic() - self._lock.last_contact

    async def run(self, lost: Callable[[], None]) -> None:
        """Take part until cancelled. `lost` is called when this replica led and must not go on: it must end the process."""

        async def lead() -> None:
            log.info("this replica leads")
            self.leading.set()

        async def stop() -> None:
            self.leading.clear()
            lost()

        config = Config(self._lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, onstarted_leading=lead, onstopped_leading=stop)
        await _Steady(config).run()

    async def release(self) -> None:
        """Give the Lease back, so that another replica need not wait until it runs out. A failure only makes it wait."""
        if self.leading.is_set():
            self.leading.clear()
            with contextlib.suppress(ApiException, aiohttp.ClientError, TimeoutError, OSError):
                await self._lock.release()


class _Steady(LeaderElection):  # type: ignore[misc] # the client is not typed
    """The client's election goes by the wall clock, which may be set; this one does not.

    Where it were set forward, one that stands by would take the lead from a leader that lives; where it were set back, it would wait for
    hours for one that does not, and a leader without a network would believe in its lead as long.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._clock = Clock()

    async def try_acquire_or_renew(self) -> bool:
        before, now = self._clock.set_time, self._clock.now()
        if self._clock.set_time != before:  # what was seen of the Lease is as if seen now
            self.observed_time_milliseconds = int(now.timestamp() * 1000)
        return bool(await super().try_acquire_or_renew())

    async def renew_loop(self) -> None:
        """Renew until that has failed for as long as the config says."""
        renewed = time.monotonic()
        while time.monotonic() - renewed < self.election_config.renew_deadline:
            if await self.try_acquire_or_renew():
                renewed = time.monotonic()
            await asyncio.sleep(self.election_config.retry_period)


class _Lock(LeaseLock):  # type: ignore[misc] # the client is not typed
    """The client's Lease lock, with time limits, and with every failure as the value that the election expects."""

    def __init__(self, name: str, namespace: str, identity: str, client: ApiClient) -> None:
        super().__init__(name, namespace, identity, client)
        self.last_contact = time.monotonic()

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                found, record = await super().get(name, namespace)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return False, ApiException(status=0, reason=repr(error))
        if found or record.status == 404:
            self.last_contact = time.monotonic()
        return found, record

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        return await self._within_time(self._create(name, namespace, election_record))

    async def _create(self, name: str, namespace: str, record: LeaderElectionRecord) -> bool:
        """As the client's own, which passes `pretty` a value that its API refuses (37.0.2)."""
        body = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(record))
        try:
            await self.api_instance.create_namespaced_lease(namespace, body)
        except ApiException as error:
            log.warning("the Lease could not be created: %s %s", error.status, error.reason)
            return False
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return await self._within_time(super().update(name, namespace, updated_record))

    async def release(self) -> None:
        """Write a Lease that nobody holds, unless another replica holds it by now. Raises what the client raises."""
        async with asyncio.timeout(CALL_SECONDS):
            lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
            if lease.spec.holder_identity == self.identity:
                lease.spec.holder_identity = ""
                lease.spec.lease_duration_seconds = 1
                lease.spec.renew_time = datetime.now(UTC).isoformat().replace("+00:00", "Z")
                lease.spec.acquire_time = lease.spec.renew_time
                await self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)

    async def _within_time(self, call: Awaitable[bool]) -> bool:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                done = bool(await call)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("the Lease could not be written: %r", error)
            return False
        if done:
            self.last_contact = time.monotonic()
        return done
