"""The profile as it was when a job was first looked at: what it gave to the job, and what still bounds it."""

from typing import Annotated

from pydantic import Field

from finetune_api.compute import NodeSelector, Resources, Tolerations
from finetune_api.fields import Quantity, StatusModel
from finetune_api.status_fields import Count, Name, Text, Uri

_QueueName = Annotated[str, Field(max_length=63)]
_UriBeginnings = Annotated[tuple[Annotated[str, Field(max_length=512)], ...], Field(max_length=64)]


class ResolvedAllowed(StatusModel):
    """URIs and queues that the job may name. A list that is absent allows everything, an empty one nothing."""

    models: _UriBeginnings | None = None
    """Models."""
    data: _UriBeginnings | None = None
    """Data."""
    storage: _UriBeginnings | None = None
    """Places for results."""
    endpoints: _UriBeginnings | None = None
    """Served models."""
    s3_endpoints: _UriBeginnings | None = None
    """S3 servers that a Secret may name beside the URIs of a list above; absent, as an operator of before left it, allows all."""
    queues: Annotated[tuple[_QueueName, ...], Field(max_length=64)] | None = None
    """Queues that its label may name, beside that of the profile."""


class ResolvedProfile(StatusModel):
    """The profile that the job runs under, as it was when the job was first looked at."""

    name: Name
    """Name of the TuningProfile."""
    generation: Count = 1
    """Its generation then."""
    chosen: Text = ""
    """How it was chosen: named by the job, or the default."""
    trainer_image: Annotated[str, Field(max_length=512)] | None = None
    """Image that it gave."""
    head_cpu: Quantity | None = None
    """CPUs of the head that it gave."""
    head_memory: Quantity | None = None
    """Memory of the head that it gave."""
    node_selector: NodeSelector = {}
    """Labels of nodes that it asks for."""
    tolerations: Tolerations = ()
    """Tolerations that it added."""
    resources_per_worker: Resources = {}
    """Resources that it gave where the job names none."""
    queue: _QueueName | None = None
    """Queue that it gave: the job's, whenever its label names none, or one that is not allowed."""
    storage: Uri | None = None
    """Storage that it gave, for a job that names none."""
    storage_secret: Name | None = None
    """Secret of that storage."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Longest activeDeadlineSeconds, also where the job's is raised later."""
    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Largest maxGpuHours, also where the job's is raised later."""
    allow: ResolvedAllowed = ResolvedAllowed()
    """What the job may name, also where it names others later (spec.monitoring, the label that names a queue)."""
    allow_remote_code: bool = False
    """Whether it allows model.trustRemoteCode."""
