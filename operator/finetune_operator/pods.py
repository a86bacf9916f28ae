"""The pods of an attempt: what they mount, may do and are told. Pure.

They keep to the restricted Pod Security Standard, hold no API token, and see only the claims, ConfigMaps and Secrets that the job names,
workers only those that they need: prepared data comes from the output, so the data's own claim may be one that a single node can mount.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from finetune_api.references import Reference, measuring_references, references_of
from finetune_api.report import REPORT_PORT
from finetune_api.v1alpha1 import Spec
from finetune_operator.settings import Settings

Manifest = dict[str, Any]
Mounted = tuple[Manifest, Manifest]
"""A volume and where it is mounted."""
Role = Literal["head", "worker"]

RAY_PORT = 6379
JOB_KEY = "job.json"
TOKEN_KEY = "attempt-token"  # noqa: S105 - a key's name
"""No key that a secretRef reads: else a job could name another attempt's Secret and have its token sent to an address of its own."""
VOLUMES = "/mnt/finetune"
JOB_FOLDER = "/etc/finetune/job"
TOKEN_FOLDER = "/etc/finetune/token"  # noqa: S105 - a folder
HOME = "/home/finetune"
TERMINATION_LOG = "/dev/termination-log"
USER = 10001
SHM_LIMIT = "2Gi"
"""Most that Ray and NCCL may put into /dev/shm; it counts as the container's memory once it is used."""
TMP_LIMIT = "20Gi"
HOSTNAME_MAX = 63
UNREACHABLE_SECONDS = 60
"""How long a pod is waited for whose node does not answer; Kubernetes' own 300 s would hold up the whole training."""
DRAIN_MARGIN_SECONDS = 30
"""Ray gets this much less than the pod's grace to drain a node."""
HUNG_SECONDS = 600
"""A head whose process does not answer its own node for so long hangs, and is killed: its attempt would never end otherwise."""
WORKER_REQUESTS: Mapping[str, str] = {"cpu": "500m", "memory": "2Gi"}
"""Requests of a worker whose job does not name them."""


def head_pod(name: str, token_secret: str, namespace: str, spec: Spec, image: str, settings: Settings) -> Manifest:
    """The head of an attempt: runs the stages, needs no GPU."""
    sizes = {"cpu": settings.head_cpu, "memory": settings.head_memory}
    volumes = _volumes("head", name, token_secret, spec)
    container = _container("head", name, namespace, image, volumes, settings)
    container |= {
        "resources": {"requests": sizes, "limits": sizes},
        "ports": [{"name": "report", "containerPort": REPORT_PORT, "protocol": "TCP"}],
        "readinessProbe": {
            "httpGet": {"path": "/healthz", "port": "report"},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 3,
        },
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": "report"},
            "periodSeconds": 30,
            "timeoutSeconds": 10,
            "failureThreshold": HUNG_SECONDS // 30,
        },
    }
    return _pod(f"{name}-head", name, container, volumes, settings)


def worker_pod(name: str, token_secret: str, namespace: str, index: int, spec: Spec, image: str, settings: Settings) -> Manifest:
    """One worker of an attempt: holds the GPUs."""
    # Server-side apply of older API servers takes quantities as strings only.
    limits = {name: str(quantity) for name, quantity in spec.compute.resources_per_worker.items()}
    volumes = _volumes("worker", name, token_secret, spec)
    container = _container("worker", name, namespace, image, volumes, settings)
    container["resources"] = {"requests": {**WORKER_REQUESTS, **limits}, "limits": limits}
    pod = _pod(f"{name}-worker-{index}", name, container, volumes, settings)
    if spec.compute.node_selector:
        pod["spec"]["nodeSelector"] = dict(spec.compute.node_selector)
    asked = [toleration.model_dump(mode="json", by_alias=True, exclude_none=True) for toleration in spec.compute.tolerations]
    pod["spec"]["tolerations"] = asked + [each for each in pod["spec"]["tolerations"] if each["key"] not in [a.get("key") for a in asked]]
    return pod


def _pod(pod_name: str, attempt_name: str, container: Manifest, volumes: Sequence[Mounted], settings: Settings) -> Manifest:
    secrets = [{"name": name} for name in settings.image_pull_secrets]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod_name},
        "spec": {
            # Only the head is looked up by name; a worker of a long-named job's hundredth attempt would not fit.
            "hostname": pod_name[:HOSTNAME_MAX].rstrip("-"),
            "subdomain": attempt_name,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": settings.grace_seconds,
            "serviceAccountName": settings.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            **({"imagePullSecrets": secrets} if secrets else {}),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": [
                {
                    "key": f"node.kubernetes.io/{state}",
                    "operator": "Exists",
                    "effect": "NoExecute",
                    "tolerationSeconds": UNREACHABLE_SECONDS,
                }
                for state in ("not-ready", "unreachable")
            ],
            "containers": [container],
            "volumes": [volume for volume, _ in volumes],
        },
    }


def _container(role: Role, name: str, namespace: str, image: str, volumes: Sequence[Mounted], settings: Settings) -> Manifest:
    return {
        "name": role,
        "image": image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", "finetune_trainer", role],
        "env": [{"name": key, "value": value} for key, value in _env(name, namespace, settings).items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [mount for _, mount in volumes],
    }


def _env(name: str, namespace: str, settings: Settings) -> dict[str, str]:
    token_file = f"{TOKEN_FOLDER}/{TOKEN_KEY}"
    return {
        "FINETUNE_JOB_FILE": f"{JOB_FOLDER}/{JOB_KEY}",
        "FINETUNE_ATTEMPT": name.rsplit("-", 1)[1],
        "FINETUNE_TOKEN_FILE": token_file,
        "FINETUNE_HEAD_HOST": f"{name}-head.{name}.{namespace}.svc",
        "FINETUNE_RAY_PORT": str(RAY_PORT),
        "FINETUNE_REPORT_PORT": str(REPORT_PORT),
        "FINETUNE_VOLUMES": VOLUMES,
        "FINETUNE_TERMINATION_LOG": TERMINATION_LOG,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token_file,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(max(settings.grace_seconds - DRAIN_MARGIN_SECONDS, 1)),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": HOME,
        "PYTHONUNBUFFERED": "1",
    }


def _volumes(role: Role, name: str, token_secret: str, spec: Spec) -> list[Mounted]:
    """Each volume with its mount: what every pod has, then what the job names."""
    return [
        _mounted("job", {"configMap": {"name": name}}, JOB_FOLDER, read_only=True),
        _mounted("token", _secret(token_secret), TOKEN_FOLDER, read_only=True),
        _mounted("home", {"emptyDir": {}}, HOME),
        _mounted("tmp", {"emptyDir": {"sizeLimit": TMP_LIMIT}}, "/tmp"),  # noqa: S108 - the pod's own
        _mounted("shm", {"emptyDir": {"medium": "Memory", "sizeLimit": SHM_LIMIT}}, "/dev/shm"),  # noqa: S108 - the pod's own
        *_named_volumes(_references(role, spec)),
    ]


def _named_volumes(references: Sequence[Reference]) -> Iterator[Mounted]:
    """The claims, ConfigMaps (only the keys) and Secrets that these name; a claim is writable only where the output is."""
    storage = next(each.claim for each in references if each.use == "storage")
    for number, claim in enumerate(sorted({each.claim for each in references if each.claim})):
        source = {"persistentVolumeClaim": {"claimName": claim}}
        yield _mounted(f"claim-{number}", source, f"{VOLUMES}/claims/{claim}", read_only=claim != storage)
    keys: dict[str, set[str]] = {}
    for named in (each.config_map for each in references if each.config_map):
        keys.setdefault(named.name, set()).add(named.key)
    for number, name in enumerate(sorted(keys)):
        items = [{"key": key, "path": key} for key in sorted(keys[name])]
        yield _mounted(f"configmap-{number}", {"configMap": {"name": name, "items": items}}, f"{VOLUMES}/configmaps/{name}", read_only=True)
    for number, secret in enumerate(sorted({each.secret for each in references if each.secret})):
        yield _mounted(f"secret-{number}", _secret(secret), f"{VOLUMES}/secrets/{secret}", read_only=True)


def _references(role: Role, spec: Spec) -> tuple[Reference, ...]:
    """What a pod must reach: the head everything, a worker the models and the output. The head asks the endpoints, and embeds."""
    everything = measuring_references(spec) if spec.monitoring is not None else references_of(spec)
    return (
        everything if role == "head" else tuple(each for each in everything if each.use in ("model", "storage") and not _is_encoder(each))
    )


def _is_encoder(reference: Reference) -> bool:
    return reference.field.endswith(".encoder")


def _secret(name: str) -> Manifest:
    return {"secret": {"secretName": name, "defaultMode": 0o440}}


def _mounted(name: str, source: Manifest, path: str, *, read_only: bool = False) -> Mounted:
    mount = {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}
    return {"name": name, **source}, mount
