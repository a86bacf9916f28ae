"""What a job's profile says of the S3 servers that its Secrets name. The operator may not read Secrets: it tells the pods, which do.

It stands in the metadata of the job file, beside what the API has of a job: a trainer image of before passes over it.
"""

from finetune_api.fields import StatusModel

BOUNDS_KEY = "endpointBounds"
"""Where it stands in the job file's metadata."""


class EndpointBounds(StatusModel):
    """The Secrets whose key `endpoint` is bounded, and the servers that it may name beside AWS's own."""

    profile: str
    """Name of the TuningProfile, for messages."""
    secrets: tuple[str, ...]
    """Names of the Secrets."""
    allowed: tuple[str, ...]
    """URLs of servers."""
