"""Text that people will read: without what must stay secret, and of a log what says something."""

import re
from urllib.parse import quote

_NAMES = (
    r"(?:aws_?)?secret_?access_?key|secret[_-]?key|client[_-]?secret|api[_-]?key|access[_-]?key|private[_-]?key|password|passwd|passphrase"
    r"|(?:access|auth|refresh|session|security|id|hub|hf|api|bearer|attempt|ray_auth)[_-]?token|x-amz-security-token|x-amz-credential"
    r"|x-(?:amz|goog)-signature|awsaccesskeyid|signature"
)
"""Of fields, variables and parameters whose values are secret."""
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)"
    # By what stands before it: headers, user and password of a URL, names of fields and parameters.
    r"|(?i:(?<=authorization: )\S.*|(?<=authorization:)\S.*|(?<=authorization=)\S.*)"
    r"|(?i:(?<=authorization[\"']: )\S.*|(?<=authorization[\"']:)\S.*)"
    r"|(?<=Bearer )\S+|(?i:(?<=bearer )\S{8,}|(?<=basic )[A-Za-z0-9+/=]{12,})"
    r"|(?<=://)[^/\s]+(?=@)"
    rf"|(?i:(?P<name>(?:{_NAMES})[\"']?\s?[=:]\s?[\"']?))[^\s\"'&,;}})]+"
    r"|(?i:(?P<short>(?:[?&]sig|[?&](?:token|key)|(?<![a-z])token[\"']?)=[\"']?|[\"']token[\"']: ?[\"']))[^\s\"'&,;})]+"
    # By its shape.
    r"|eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?"  # JSON web tokens
    r"|hf_[A-Za-z0-9_]{8,}|api_org_[A-Za-z0-9]{8,}"
    r"|(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|(?:(?<![A-Za-z0-9])|(?<=\[\dm)|(?<=\[\d\dm))(?:sk|pk|rk)-[A-Za-z0-9_-]{16,}"  # a colour's end is no letter before it
    r"|xox[a-z]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{10,}"
    r"|(?:pypi|npm|dckr_pat|wandb_v1|dop_v1|nvapi)[-_][A-Za-z0-9_-]{16,}"
    r"|(?<![A-Za-z0-9/+=_.-])(?!/)(?=[A-Za-z0-9/+]{0,39}[A-Z])(?=[A-Za-z0-9/+]{0,39}[a-z])(?=[A-Za-z0-9/+]{0,39}[0-9])[A-Za-z0-9/+]{40}"
    r"(?![A-Za-z0-9/+=_.-])"  # AWS's secret keys; a digest in hex has no capitals
)
_ROUNDS = 4
"""More than it takes until nothing more is found: what was hidden may leave behind what is to be hidden, too."""

_SHORTEST = 8
"""Characters of a secret that can be hidden for itself: a shorter one could be a part of any word."""
_known: tuple[str, ...] = ()
"""This process's own secrets, the longest first."""


def hide(secret: str) -> None:
    """Take this text for a secret from now on, wherever in this process a text is scrubbed: a server may repeat what it was sent."""
    global _known  # noqa: PLW0603 - what is read anywhere must be hidden everywhere
    found = {*_known, secret, quote(secret, safe="")} if len(secret) >= _SHORTEST else set(_known)
    _known = tuple(sorted(found, key=lambda each: (-len(each), each)))


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, or what turns a text's direction around; a tab and a line break are harmless. Half a character, as JSON may hold
it, can be written nowhere: neither to a log nor in a report."""


def scrub(text: str) -> str:
    """The text without what is known for a secret (`hide`), and what looks like a token, a key or a password.

    A second line of defence, never the first.

    Some of it is a stranger's (a server's words, a column's name), so what would change the reader's terminal is shown as a sign.
    """
    clean = _CONTROLS.sub("\ufffd", text)
    for secret in _known:
        clean = clean.replace(secret, "***")
    for _ in range(_ROUNDS):
        before, clean = clean, _SECRETS.sub(_hidden, clean)
        if clean == before:
            break
    return clean


def _hidden(found: re.Match[str]) -> str:
    """Stars, after the name that says what was there."""
    return f"{found['name'] or found['short'] or ''}***"


def brief(text: str, limit: int) -> str:
    """The text scrubbed, and cut where it is longer than `limit` characters: first the one, so that no half of a secret is left."""
    clean = scrub(text)
    return clean if len(clean) <= limit else clean[: max(limit - 1, 0)] + "…"[:limit]


_MARKERS = re.compile(r"[\s^~]*")


def telling_lines(text: str) -> list[str]:
    """The lines that say something: those that are not blank, nor the marks (`~~~~^^^^`) which point at the line of code above them."""
    return [line.rstrip() for line in text.splitlines() if not _MARKERS.fullmatch(line)]


def last_lines(text: str, limit: int) -> str:
    """The end of a log, scrubbed, within `limit` characters, from the beginning of a line where one begins there."""
    whole = "\n".join(telling_lines(scrub(text)))
    if len(whole) <= limit:
        return whole.strip()
    end = whole[-limit:] if limit > 0 else ""
    return (end.partition("\n")[2] or end).strip()
