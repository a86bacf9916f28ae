"""What the jobs of a namespace have used since this process began, jobs that are gone included. Pure.

A counter that Prometheus may take the increase of: it begins at zero with the process, and never falls. What a job had used before it was
first seen is left out, or each restart would count it anew.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Used:
    """GPU-seconds and tokens."""

    gpu_seconds: float = 0.0
    trained_tokens: float = 0.0

    def beyond(self, other: "Used") -> "Used":
        """What this is above another; never below nothing."""
        return Used(max(self.gpu_seconds - other.gpu_seconds, 0.0), max(self.trained_tokens - other.trained_tokens, 0.0))

    def plus(self, other: "Used") -> "Used":
        """Both together."""
        return Used(self.gpu_seconds + other.gpu_seconds, self.trained_tokens + other.trained_tokens)


class UsageTotals:
    """Totals by namespace."""

    def __init__(self) -> None:
        self._known: dict[str, Used] = {}
        self._totals: defaultdict[str, Used] = defaultdict(Used)

    def see(self, job: Mapping[str, Any]) -> None:
        """Add what a job has used since it was seen last. A job as it is deleted tells its last figures."""
        usage = (job.get("status") or {}).get("usage") or {}
        now = Used(float(usage.get("gpuSeconds", 0)), float(usage.get("trainedTokens", 0)))
        uid, namespace = job["metadata"]["uid"], job["metadata"]["namespace"]
        before = self._known.setdefault(uid, now)
        self._totals[namespace] = self._totals[namespace].plus(now.beyond(before))
        self._known[uid] = now

    def keep(self, uids: Collection[str]) -> None:
        """Forget jobs other than these; what they have used stays counted."""
        self._known = {uid: used for uid, used in self._known.items() if uid in uids}

    def __iter__(self) -> Iterator[tuple[str, Used]]:
        """Each namespace with what its jobs have used."""
        return iter(self._totals.items())
