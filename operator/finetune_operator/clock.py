"""The wall clock, and whether somebody has set it meanwhile: deadlines outlive the process, so they are told by no other clock.

And for how long this process has looked at each job: what nobody saw is no reason to fail it.
"""

import logging
import time
from datetime import UTC, datetime

SET_SECONDS = 5.0
"""A clock that differs by so much from the time that has passed since it was last read was set. Small corrections are nobody's concern."""

GAP_SECONDS = 300.0
"""A job that nobody looked at for so long was out of sight: longer than the longest wait after errors."""
GAP_LOOKS = 3
"""So many looks that did not come, where they come more rarely."""

log = logging.getLogger(__name__)


class Clock:
    """The time of this machine."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()
        self.set_time: datetime | None = None
        """When the clock was last found to have been set, by what it says since then."""

    def now(self) -> datetime:
        """The time, in UTC."""
        wall = time.time()
        ahead, before = wall - time.monotonic(), self._ahead
        self._ahead = ahead
        now = datetime.fromtimestamp(wall, UTC)
        if abs(ahead - before) > SET_SECONDS:
            log.warning("the clock was set %s by %.0f s", "forward" if ahead > before else "back", abs(ahead - before))
            self.set_time = now
        return now


class Looks:
    """For how long each job has been looked at again and again by this process, which may have been away, or without the API server."""

    def __init__(self, poll_seconds: float) -> None:
        self._gap = max(GAP_SECONDS, GAP_LOOKS * poll_seconds)
        self._known: dict[tuple[str, str], tuple[float, float]] = {}
        """When a job's looks began, and its last one (monotonic)."""

    def seen(self, key: tuple[str, str]) -> float:
        """The job is looked at; seconds since the first look of those that no gap divides."""
        now = time.monotonic()
        begun, last = self._known.get(key, (now, now))
        begun = begun if now - last < self._gap else now
        self._known[key] = (begun, now)
        return now - begun

    def forget(self, key: tuple[str, str]) -> None:
        """The job is gone."""
        self._known.pop(key, None)
