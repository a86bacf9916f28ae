"""What the operator tells a pod by its environment, read once at start."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_api.endpoint_bounds import BOUNDS_KEY, EndpointBounds
from finetune_api.newer_fields import without_unknown
from finetune_api.reasons import Reason
from finetune_api.scrub import hide
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer.errors import JobError
from finetune_trainer.sources import Mounts

Role = Literal["head", "worker"]
ROLES: tuple[Role, ...] = ("head", "worker")

SCRATCH_PARENT_MAX = 13
"""Longest TMPDIR that leaves room for what Ray adds: /finetune-01234567-1/4194304, the session with time and pid, sockets/plasma_store."""


@dataclass(frozen=True)
class Environment:
    """Where one attempt of one job finds its things."""

    job_file: Path
    attempt: int
    token_file: Path
    head_host: str
    ray_port: int
    report_port: int
    volumes: Path
    """Folder under which claims, ConfigMaps and Secrets are mounted."""
    termination_log: Path | None = None
    local: bool = False
    """Whether the pods are processes of one machine: they share its address, so ports must not be fixed."""
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The whole environment, for child processes."""

    @property
    def ray_address(self) -> str:
        """Address of the Ray head, host:port."""
        return f"{self.head_host}:{self.ray_port}"

    @property
    def report_url(self) -> str:
        """Base URL of the head's HTTP server."""
        return f"http://{self.head_host}:{self.report_port}"

    def token(self) -> str:
        """The attempt's secret. Raises OSError where the file cannot be read."""
        token = self.token_file.read_text(encoding="utf-8").strip()
        hide(token)
        return token

    def job(self) -> FineTuneJob:
        """The job as the operator resolved it. Raises JobError(InvalidSpec) naming each field at fault."""
        with _faults_of_job_file():
            return _parsed(json.loads(self.job_file.read_bytes()), local=self.local)

    def mounts(self) -> Mounts:
        """The pod's volumes, with what the job's profile says of the Secrets among them. Raises JobError (InvalidSpec)."""
        with _faults_of_job_file():
            told = json.loads(self.job_file.read_bytes())["metadata"].get(BOUNDS_KEY)
            bounds = None if told is None else EndpointBounds.model_validate(told)
        return Mounts(self.volumes, self.local, bounds)


@contextmanager
def _faults_of_job_file() -> Iterator[None]:
    """Say what is wrong with the job file as JobError(InvalidSpec), naming each field at fault."""
    try:
        yield
    except ValidationError as error:
        raise JobError(Reason.INVALID_SPEC, "; ".join(map(_told, error.errors()[:5]))) from None
    except (OSError, ValueError) as error:
        raise JobError(Reason.INVALID_SPEC, f"the job file cannot be read: {error}") from None


def _parsed(manifest: dict[str, Any], *, local: bool) -> FineTuneJob:
    """The job in a file, also of a newer operator's, which may say more than is known here (see newer_fields)."""
    try:
        return parse_job(manifest, local=local)
    except ValidationError as error:
        unknown = [fault["loc"][1:] for fault in error.errors() if fault["type"] == "extra_forbidden" and fault["loc"][0] == "spec"]
        if not unknown or "chosen" not in manifest.get("metadata", {}):
            raise
        known = without_unknown(manifest["spec"], [each for each in unknown if each], manifest["metadata"]["chosen"])
        return parse_job({**manifest, "spec": known}, local=local)


def _told(fault: ErrorDetails) -> str:
    """A field, and what is wrong with it in the API's own words, where it has some: pydantic's begin with the kind of the error."""
    own = fault["ctx"]["error"] if fault["type"] == "value_error" else fault["msg"]
    return f"{'.'.join(map(str, fault['loc']))}: {own}"


def environment_from(variables: Mapping[str, str]) -> Environment:
    """The environment of a pod. Raises ValueError naming the variable that is absent or wrong."""
    log = variables.get("FINETUNE_TERMINATION_LOG")
    return Environment(
        job_file=Path(_required(variables, "FINETUNE_JOB_FILE")),
        attempt=_number(variables, "FINETUNE_ATTEMPT", 1),
        token_file=Path(_required(variables, "FINETUNE_TOKEN_FILE")),
        head_host=_required(variables, "FINETUNE_HEAD_HOST"),
        ray_port=_number(variables, "FINETUNE_RAY_PORT", 6379),
        report_port=_number(variables, "FINETUNE_REPORT_PORT", 8000),
        volumes=Path(variables.get("FINETUNE_VOLUMES", "/mnt/finetune")),
        termination_log=Path(log) if log else None,
        local=variables.get("FINETUNE_LOCAL") == "1",
        variables=dict(variables),
    )


def scratch_folder(job_uid: str, attempt: int) -> Path:
    """Folder for Ray's sockets and logs; short, since the path of a socket may have 107 bytes."""
    parent = tempfile.gettempdir()
    if len(parent) > SCRATCH_PARENT_MAX:
        parent = "/tmp"  # noqa: S108 - a pod's own
    return Path(parent) / f"finetune-{job_uid[:8] or 'job'}-{attempt}"


def own_folder(job: FineTuneJob) -> str:
    """The job's own folder in output.storage; a measuring run's, whose job file tells of monitoring, is in that."""
    own = f".finetune/{job.metadata.uid}"
    return f"{own}/monitoring" if job.spec.monitoring is not None else own


def _required(variables: Mapping[str, str], name: str) -> str:
    value = variables.get(name)
    if not value:
        raise ValueError(f"{name} is not set")
    return value


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, str(default))
    if not text.isdigit():
        raise ValueError(f"{name} must be a whole number, not {text!r}")
    return int(text)
