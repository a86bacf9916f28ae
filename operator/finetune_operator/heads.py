"""What the heads of jobs say: one request of a tenant's pod, which is trusted with nothing and may not hold anybody up.

A head that lets a question run out is not asked again for a while, so that silent ones do not take the operator's time from other jobs.
What is wrong with a head is logged once, not at every look. Both are remembered in this process alone: losing them costs a question.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import aiohttp

from finetune_api.report import Report, parse_report
from finetune_operator.observed import Pod

REPORT_SECONDS = 3.0
"""Longest wait for a head, beyond the time that it is asked to hold the answer back."""
REPORT_BYTES = 512 * 1024
"""Largest report that is read: the head is a tenant's pod, so nothing it sends is taken on trust."""
SILENCE_SECONDS = 10.0
"""How long a head is left alone that did not answer in time; twice as long each time that it does not."""
SILENCE_MAX_SECONDS = 120.0
FORGET_SECONDS = 900.0
"""A head that nobody has asked for so long is gone."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trouble:
    """What is wrong with a head."""

    words: str
    silences: int
    """Questions in a row that ran out."""
    since: float
    """When it was last asked (monotonic)."""

    @property
    def until(self) -> float:
        """Before this it is not asked again."""
        wait = min(SILENCE_SECONDS * 2.0 ** (self.silences - 1), SILENCE_MAX_SECONDS) if self.silences else 0.0
        return self.since + wait


class Heads:
    """Asks heads for their reports. An async context manager."""

    def __init__(self, port: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._clock = clock
        self._troubles: dict[str, _Trouble] = {}

    async def __aenter__(self) -> "Heads":
        # Bodies are not unpacked: a small one could grow beyond any limit.
        self._session = aiohttp.ClientSession(
            auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), headers={"Accept-Encoding": "identity"}
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    async def report(self, pod: Pod, token: str, after: int, wait: float) -> Report | None:
        """What the head says of its work, or None where it says nothing that can be understood. Never raises for that.

        The head holds its answer back for up to `wait` seconds, until its revision is beyond `after`.
        """
        before = self._troubles.get(pod.uid)
        if not pod.ip or (before and self._clock() < before.until):
            return None
        host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        try:
            async with self._session.get(
                f"http://{host}:{self._port}/report",
                params={"after": str(after), "wait": str(wait)},
                headers={"Authorization": f"Bearer {token}"},
                timeout=aiohttp.ClientTimeout(total=wait + REPORT_SECONDS, sock_connect=REPORT_SECONDS),
                allow_redirects=False,
            ) as response:
                body = await _read_at_most(response, REPORT_BYTES)
        except TimeoutError:
            self._troubled(pod, "no answer in time", silent=True)
            return None
        except (aiohttp.ClientError, OSError) as error:
            log.debug("no report from %s: %r", pod.name, error)  # a head that starts refuses connections
            return None
        if response.status != 200 or body is None:
            self._troubled(pod, f"HTTP status {response.status}{', too large' if body is None else ''}", silent=False)
            return None
        self._troubles.pop(pod.uid, None)
        return parse_report(body)

    def _troubled(self, pod: Pod, words: str, *, silent: bool) -> None:
        now, before = self._clock(), self._troubles.get(pod.uid)
        if before is None or before.words != words:
            log.warning("no report from %s: %s", pod.name, words)
        silences = (before.silences if before else 0) + 1 if silent else 0
        known = {uid: trouble for uid, trouble in self._troubles.items() if now < trouble.since + FORGET_SECONDS}
        self._troubles = {**known, pod.uid: _Trouble(words, silences, now)}


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    """The body, or None where it is longer than the limit."""
    body = b""
    async for chunk in response.content.iter_chunked(8192):
        body += chunk
        if len(body) > limit:
            return None
    return body
