"""Whether a URI is on a list of beginnings of URIs: segment by segment, in one spelling.

What could be read in more than one way (escapes, `.` and `..`, empty segments, control characters) is on no list. Case tells names apart,
but for the host of an endpoint. Scheme and path are compared as they stand: a spelling that a hub would take for the same name is refused
where the list has another, never the other way round.
"""

import re
from collections.abc import Iterable

Canonical = tuple[str, tuple[str, ...]]
"""Scheme, and segments: host or owner first."""

_FORM = re.compile(r"([a-z0-9]+)://([A-Za-z0-9_.=+@:/-]*)", re.ASCII)
_HOST = re.compile(r"([A-Za-z0-9.-]+)(?::([0-9]{1,5}))?", re.ASCII)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def allows(beginnings: Iterable[str] | None, uri: str) -> bool:
    """Whether the URI begins with one of these; None stands for every URI."""
    if beginnings is None:
        return True
    asked = canonical(uri)
    return asked is not None and any(_begins(asked, listed) for each in beginnings if (listed := canonical(each)) is not None)


def is_one_of(urls: Iterable[str], url: str) -> bool:
    """Whether the URL is one of these, up to the spelling of host and port: what is below one of them is another."""
    asked = canonical(url)
    return asked is not None and any(asked == canonical(each) for each in urls)


def _begins(asked: Canonical, listed: Canonical) -> bool:
    return asked[0] == listed[0] and asked[1][: len(listed[1])] == listed[1]


def canonical(uri: str) -> Canonical | None:
    """The one spelling of a URI; None where it has several, or is none."""
    form = _FORM.fullmatch(uri)
    if form is None:
        return None
    scheme, rest = form[1], form[2]
    segments = rest.removesuffix("/").split("/") if rest else []
    if any(segment == "" or set(segment) == {"."} or ".." in segment for segment in segments):
        return None
    if scheme in _DEFAULT_PORTS and segments:
        host = _host(segments[0], _DEFAULT_PORTS[scheme])
        return (scheme, (host, *segments[1:])) if host else None
    return scheme, tuple(segments)


def _host(text: str, default_port: int) -> str | None:
    """A host without its default port; None where there is no host, or something beside it."""
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    port = int(found[2]) if found[2] else default_port
    name = found[1].lower()
    return name if port == default_port else f"{name}:{port}"
