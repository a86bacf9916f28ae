"""What the operator's environment says, read once at start. A field of `Settings` names its variable, and says what it is for."""

import hashlib
import hmac
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from finetune_api.report import REPORT_PORT

GangScheduler = Literal["none", "kueue", "volcano", "scheduler-plugins"]
GANG_SCHEDULERS: tuple[GangScheduler, ...] = get_args(GangScheduler)
KEY_BYTES = 16
"""Fewer bytes of a key could be guessed."""


def _text(_: str, given: str) -> str:
    return given


def _words(_: str, given: str) -> tuple[str, ...]:
    return tuple(given.replace(",", " ").split())


def _switch(name: str, given: str) -> bool:
    if given.lower() not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, not {given!r}")
    return given.lower() == "true"


def _number(name: str, given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, not {given!r}")
    if value <= 0:
        raise ValueError(f"{name} must be larger than 0, not {given}")
    return value


def _whole(name: str, given: str) -> int:
    value = _number(name, given)
    if not value.is_integer():
        raise ValueError(f"{name} must be a whole number, not {given}")
    return int(value)


def _scheduler(name: str, given: str) -> GangScheduler:
    for known in GANG_SCHEDULERS:
        if given == known:
            return known
    raise ValueError(f"{name} must be one of {', '.join(GANG_SCHEDULERS)}, not {given!r}")


def _key(name: str, given: str) -> bytes:
    try:
        key = Path(given).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{name}: {given} cannot be read: {error.strerror}") from None
    if len(key) < KEY_BYTES:
        raise ValueError(f"{name}: {given} holds fewer than {KEY_BYTES} bytes")
    return key


Reader = Callable[[str, str], Any]
"""From a variable's name and what it says to the field's value. Raises ValueError naming the variable."""


def _from(variable: str, default: object, words: str, read: Reader = _text) -> Any:  # noqa: ANN401 - a dataclass's field, as `field` has it
    return field(default=default, metadata={"variable": f"FINETUNE_{variable}", "words": words, "read": read})


@dataclass(frozen=True)
class Settings:
    """Everything about the platform that a job does not say itself."""

    token_key: bytes = _from(
        "TOKEN_KEY_FILE", b"", f"file with a secret of {KEY_BYTES} bytes or more, the same for every replica; must be set", _key
    )
    """Key that the attempts' tokens are derived from, so that no Secret has to be read to know one."""
    trainer_image: str = _from("TRAINER_IMAGE", "finetune-trainer:latest", "image of head and worker pods")
    operator_namespace: str = _from("OPERATOR_NAMESPACE", "finetune-system", "namespace of the operator's own pods and its Lease")
    """NetworkPolicies let it in."""
    watch_namespaces: tuple[str, ...] = _from("WATCH_NAMESPACES", (), "namespaces whose jobs are run, by commas; empty is all", _words)
    head_cpu: str = _from("HEAD_CPU", "1", "CPUs of a head pod")
    head_memory: str = _from("HEAD_MEMORY", "4Gi", "memory of a head pod")
    image_pull_policy: str = _from("IMAGE_PULL_POLICY", "IfNotPresent", "when a node pulls the trainer's image")
    image_pull_secrets: tuple[str, ...] = _from("IMAGE_PULL_SECRETS", (), "Secrets that it is pulled with, by commas", _words)
    service_account: str = _from("TRAINER_SERVICE_ACCOUNT", "default", "ServiceAccount of head and worker pods")
    grace_seconds: int = _from("GRACE_SECONDS", 90, "time that a pod gets to save a checkpoint when it must go", _whole)
    poll_seconds: float = _from("POLL_SECONDS", 10.0, "how often a running job's report is read when nothing else happens", _number)
    retry_base_seconds: float = _from(
        "RETRY_BASE_SECONDS", 10.0, "wait before the second attempt; doubled for each further failure, at most 360 s", _number
    )
    max_concurrent: int = _from("MAX_CONCURRENT", 16, "jobs that are reconciled at the same time", _whole)
    http_port: int = _from("HTTP_PORT", 8080, "port of /healthz, /readyz and /metrics", _whole)
    report_port: int = _from("REPORT_PORT", REPORT_PORT, "port of a head's /report; the trainer image's own", _whole)
    leader_election: bool = _from("LEADER_ELECTION", True, "whether several replicas agree on one that works", _switch)
    gang_scheduler: GangScheduler = _from(  # noqa: RUF009 - as `field`
        "GANG_SCHEDULER", "kueue", f"who lets workers in as one: {', '.join(GANG_SCHEDULERS)}", _scheduler
    )
    """kueue does so only for jobs in a queue, by their label or their profile."""
    scheduler_name: str = _from("SCHEDULER_NAME", "", "schedulerName of gang-scheduled workers; empty is the scheduler's usual name")
    require_profile: bool = _from("REQUIRE_PROFILE", False, "whether jobs run only under a TuningProfile", _switch)
    """The one that a job names, or the default."""
    log_level: str = _from("LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR")
    local: bool = False
    """Pods are processes on this machine: jobs may name `file://` paths. No variable says so."""

    def token(self, job_uid: str, attempt: int) -> str:
        """The token of one attempt: its Ray cluster and its report answer to nothing else."""
        return hmac.new(self.token_key, f"{job_uid}/{attempt}".encode(), hashlib.sha256).hexdigest()


def settings_from(env: Mapping[str, str]) -> Settings:
    """Settings from FINETUNE_* variables; an empty one says nothing. Raises ValueError naming the variable at fault."""
    if not env.get("FINETUNE_TOKEN_KEY_FILE"):
        raise ValueError(
            "FINETUNE_TOKEN_KEY_FILE is not set: it names the file with the key for the attempts' tokens"
            " (`finetune operator --help` lists every variable)"
        )
    said = {each.name: (each.metadata, env.get(each.metadata["variable"])) for each in fields(Settings) if each.metadata}
    return Settings(**{name: about["read"](about["variable"], given) for name, (about, given) in said.items() if given})


def variables() -> Iterator[tuple[str, str, str]]:
    """Each variable that the operator reads: its name, its default as one would write it, and what it is for."""
    for each in fields(Settings):
        if each.metadata:
            default = each.default
            yield each.metadata["variable"], str(default).lower() if isinstance(default, bool) else _shown(default), each.metadata["words"]


def _shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default or "")
