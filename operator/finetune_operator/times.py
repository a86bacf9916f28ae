"""Times of a status: RFC 3339 in UTC, to the second. Pure."""

from datetime import datetime, timedelta


def rfc3339(time: datetime) -> str:
    """The time as Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def in_order(since: str, now: datetime, clock_set: datetime | None) -> bool:
    """Whether from then to now it is as long as it seems: the clock that told both has not been set in between, as far as one can know."""
    return later(since, 0) <= now and (clock_set is None or clock_set.replace(microsecond=0) <= later(since, 0))


def not_before(now: datetime, begun: str | None) -> str:
    """The time now, as the end of what began then: never before that, though the clock may have been set back."""
    return rfc3339(max(now, later(begun, 0)) if begun else now)


def later(time: str, seconds: float) -> datetime:
    """The time so many seconds after one that a status tells."""
    return datetime.fromisoformat(time) + timedelta(seconds=seconds)
