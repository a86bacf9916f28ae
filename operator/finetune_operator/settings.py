"""What the operator's environment says, read once at start."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from finetune_api.report import REPORT_PORT

GangScheduler = Literal["none", "kueue", "volcano", "scheduler-plugins"]
GANG_SCHEDULERS: tuple[GangScheduler, ...] = get_args(GangScheduler)


@dataclass(frozen=True)
class Settings:
    """Everything about the platform that a job does not say itself."""

    trainer_image: str = "finetune-trainer:latest"
    """Image of head and worker pods."""
    token_key: bytes = b""
    """Key that the attempts' tokens are derived from, so that no Secret has to be read to know one."""
    operator_namespace: str = "finetune-system"
    """Namespace of the operator's own pods (its Lease; NetworkPolicies let it in)."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose jobs are run; empty is all."""
    head_cpu: str = "1"
    head_memory: str = "4Gi"
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    service_account: str = "default"
    grace_seconds: int = 90
    """Time that a pod gets to save a checkpoint when it must go."""
    poll_seconds: float = 10.0
    """How often a running job's report is read when nothing else happens."""
    retry_base_seconds: float = 10.0
    """Wait before the second attempt; doubled for each further failure, at most 360 s."""
    max_concurrent: int = 16
    """Jobs that are reconciled at the same time."""
    http_port: int = 8080
    """Port of /healthz, /readyz and /metrics."""
    report_port: int = REPORT_PORT
    """Port of a head's /report."""
    leader_election: bool = True
    gang_scheduler: GangScheduler = "kueue"
    """Who lets a job's workers in as one gang; kueue does so only for jobs in a queue, by their label or their profile."""
    scheduler_name: str = ""
    """schedulerName of gang-scheduled workers; empty is the scheduler's usual name."""
    require_profile: bool = False
    """A job runs only under a TuningProfile: the one that it names, or the default."""
    local: bool = False
    """Pods are processes on this machine: jobs may name `file://` paths."""

    def token(self, job_uid: str, attempt: int) -> str:
        """The token of one attempt: its Ray cluster and its report answer to nothing else."""
        return hmac.new(self.token_key, f"{job_uid}/{attempt}".encode(), hashlib.sha256).hexdigest()


def settings_from(env: Mapping[str, str]) -> Settings:
    """Settings from FINETUNE_* variables. Raises ValueError naming the variable at fault."""
    key_file = env.get("FINETUNE_TOKEN_KEY_FILE")
    if not key_file:
        raise ValueError("FINETUNE_TOKEN_KEY_FILE is not set: it names the file with the key for the attempts' tokens")
    key = Path(key_file).read_bytes().strip()
    if len(key) < 16:
        raise ValueError(f"FINETUNE_TOKEN_KEY_FILE: {key_file} holds fewer than 16 bytes")
    return Settings(
        token_key=key,
        trainer_image=env.get("FINETUNE_TRAINER_IMAGE", Settings.trainer_image),
        operator_namespace=env.get("FINETUNE_OPERATOR_NAMESPACE", Settings.operator_namespace),
        watch_namespaces=_words(env.get("FINETUNE_WATCH_NAMESPACES", "")),
        head_cpu=env.get("FINETUNE_HEAD_CPU", Settings.head_cpu),
        head_memory=env.get("FINETUNE_HEAD_MEMORY", Settings.head_memory),
        image_pull_policy=env.get("FINETUNE_IMAGE_PULL_POLICY", Settings.image_pull_policy),
        image_pull_secrets=_words(env.get("FINETUNE_IMAGE_PULL_SECRETS", "")),
        service_account=env.get("FINETUNE_TRAINER_SERVICE_ACCOUNT", Settings.service_account),
        grace_seconds=int(_number(env, "FINETUNE_GRACE_SECONDS", Settings.grace_seconds)),
        poll_seconds=_number(env, "FINETUNE_POLL_SECONDS", Settings.poll_seconds),
        retry_base_seconds=_number(env, "FINETUNE_RETRY_BASE_SECONDS", Settings.retry_base_seconds),
        max_concurrent=int(_number(env, "FINETUNE_MAX_CONCURRENT", Settings.max_concurrent)),
        http_port=int(_number(env, "FINETUNE_HTTP_PORT", Settings.http_port)),
        report_port=int(_number(env, "FINETUNE_REPORT_PORT", Settings.report_port)),
        gang_scheduler=_one_of(env, "FINETUNE_GANG_SCHEDULER", Settings.gang_scheduler),
        scheduler_name=env.get("FINETUNE_SCHEDULER_NAME", Settings.scheduler_name),
        require_profile=env.get("FINETUNE_REQUIRE_PROFILE", "false").lower() == "true",
        leader_election=env.get("FINETUNE_LEADER_ELECTION", "true").lower() != "false",
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _one_of(env: Mapping[str, str], name: str, default: GangScheduler) -> GangScheduler:
    given = env.get(name) or default
    for known in GANG_SCHEDULERS:
        if given == known:
            return known
    raise ValueError(f"{name} must be one of {', '.join(GANG_SCHEDULERS)}, not {given!r}")


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(env.get(name, default))
    except ValueError:
        raise ValueError(f"{name} must be a number, not {env[name]!r}") from None
    if value <= 0:
        raise ValueError(f"{name} must be larger than 0, not {value}")
    return value
