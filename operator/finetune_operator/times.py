"""Times of a status: RFC 3339 in UTC, to the second. Pure."""

from datetime import datetime, timedelta


def rfc3339(time: datetime) -> str:
    """The time as Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def later(time: str, seconds: float) -> datetime:
    """The time so many seconds after one that a status tells."""
    return datetime.fromisoformat(time) + timedelta(seconds=seconds)
