"""Text that people will read: without what must stay secret, and of a log what says something."""

import re

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?i:(?<=bearer )\S+)"
    r"|(?i:(?<=authorization: )\S.*)"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=secretaccesskey=)\S+|(?<=secret_key=)\S+|(?<=x-amz-signature=)[0-9a-f]+|(?<=x-amz-security-token=)[^&\s]+)"
)

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys, or what turns a text's direction around; a tab and a line break are harmless. Half a character, as JSON may hold
it, can be written nowhere: neither to a log nor in a report."""


def scrub(text: str) -> str:
    """The text without what looks like a token, a key or a password: a second line of defence, never the first.

    Some of it is a stranger's (a server's words, a column's name), so what would change the reader's terminal is shown as a sign.
    """
    return _CONTROLS.sub("\ufffd", _SECRETS.sub("***", text))


_MARKERS = re.compile(r"[\s^~]*")


def telling_lines(text: str) -> list[str]:
    """The lines that say something: those that are not blank, nor the marks (`~~~~^^^^`) which point at the line of code above them."""
    return [line.rstrip() for line in text.splitlines() if not _MARKERS.fullmatch(line)]
