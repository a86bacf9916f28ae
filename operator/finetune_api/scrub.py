"""Text that people will read, without what must stay secret."""

import re

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?i:(?<=bearer )\S+)"
    r"|(?i:(?<=authorization: )\S.*)"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
    r"|(?i:(?<=secretaccesskey=)\S+|(?<=secret_key=)\S+|(?<=x-amz-signature=)[0-9a-f]+|(?<=x-amz-security-token=)[^&\s]+)"
)


def scrub(text: str) -> str:
    """The text without what looks like a token, a key or a password: a second line of defence, never the first."""
    return _SECRETS.sub("***", text)
