"""From a pod's manifest to a command and an environment on this machine. Pure.

A container sees its volumes at fixed paths; a process sees the machine's. So every value that is a path in a volume is rewritten to the
folder that holds the volume here.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_operator.local.state import State

Raw = Mapping[str, Any]

TERMINATION_LOG = "termination-log"
_PORT = re.compile(r"^[A-Z0-9_]+_PORT$")
_DROPPED = re.compile(r"^(FINETUNE|RAY|KUBERNETES)_|^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES)$")
"""Variables of this program's own environment that would lead a trainer astray."""


@dataclass(frozen=True)
class Launch:
    """What to start for a pod."""

    command: tuple[str, ...]
    env: dict[str, str]
    folders: tuple[Path, ...]
    """Folders that must exist first: the pod's own volumes."""


def launch(
    pod: Raw,
    state: State,
    port: Callable[[str], int],
    inherited: Mapping[str, str],
    extra: Mapping[str, str],
    programs: Mapping[str, Sequence[str]],
) -> Launch:
    """What to start for a pod's one container.

    `port` gives a free port of this machine for a variable `<NAME>_PORT`, the same for all pods of an attempt. `programs` replaces the
    command of the containers that it names. `extra` overrides the manifest's variables.
    Raises ValueError for a pod that cannot be a process.
    """
    (container,) = pod["spec"]["containers"]
    volumes = {volume["name"]: _volume_folder(volume, pod["metadata"]["name"], state) for volume in pod["spec"].get("volumes") or ()}
    paths = {mount["mountPath"]: volumes[mount["name"]] / mount.get("subPath", "") for mount in container.get("volumeMounts") or ()}
    paths[container.get("terminationMessagePath", "/dev/termination-log")] = state.pod(pod["metadata"]["name"]) / TERMINATION_LOG
    env = {name: value for name, value in inherited.items() if not _DROPPED.match(name)}
    for entry in container.get("env") or ():
        if "value" not in entry:
            raise ValueError(f"the variable {entry['name']} of pod {pod['metadata']['name']} has no plain value")
        name, value = entry["name"], str(entry["value"])
        env[name] = str(port(name)) if _PORT.match(name) and value.isdigit() else rewritten(value, paths)
    command = [*(container.get("command") or ()), *(container.get("args") or ())]
    program = programs.get(container["name"]) or [sys.executable if word == "python" else rewritten(word, paths) for word in command]
    own = tuple(folder for folder in volumes.values() if folder.is_relative_to(state.pod(pod["metadata"]["name"])))
    return Launch(tuple(program), {**env, **extra}, own)


def rewritten(value: str, paths: Mapping[str, Path]) -> str:
    """The value, or where it is a path in one of the volumes, the path here. The deepest volume wins, as it does in a container."""
    if not value.startswith("/"):
        return value
    for mount in sorted(paths, key=len, reverse=True):
        if PurePosixPath(value).is_relative_to(mount):
            return str(paths[mount].joinpath(*PurePosixPath(value).relative_to(mount).parts))
    return value


def gpus_wanted(pod: Raw) -> int:
    """GPUs that a pod asks for."""
    return sum(
        int((container.get("resources", {}).get("limits") or {}).get("nvidia.com/gpu", 0)) for container in pod["spec"]["containers"]
    )


def _volume_folder(volume: dict[str, Any], pod: str, state: State) -> Path:
    """The folder that holds a volume here. Raises ValueError for a kind of volume that this machine does not have."""
    if "configMap" in volume:
        return state.config_map(volume["configMap"]["name"])
    if "secret" in volume:
        return state.secret(volume["secret"]["secretName"])
    if "persistentVolumeClaim" in volume:
        return state.claim(volume["persistentVolumeClaim"]["claimName"])
    if "emptyDir" in volume:
        return state.pod(pod) / "volumes" / str(volume["name"])
    raise ValueError(f"the volume {volume['name']} of pod {pod} is of a kind that local runs do not have")


def exit_code(returncode: int) -> int:
    """The code that a container's exit has: 128 + N where signal N ended it."""
    return 128 - returncode if returncode < 0 else returncode


def running_status(container: str, now: str) -> dict[str, Any]:
    """Status of a pod whose process runs."""
    return {
        "phase": "Running",
        "hostIP": "127.0.0.1",
        "podIP": "127.0.0.1",
        "startTime": now,
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in ("PodScheduled", "Ready")],
        "containerStatuses": [{"name": container, "ready": True, "restartCount": 0, "state": {"running": {"startedAt": now}}}],
    }


def ended_status(container: str, code: int, message: str, now: str) -> dict[str, Any]:
    """Status of a pod whose process has ended."""
    ended = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "message": message, "finishedAt": now}
    return {
        "phase": "Succeeded" if code == 0 else "Failed",
        "hostIP": "127.0.0.1",
        "podIP": "127.0.0.1",
        "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted", "lastTransitionTime": now}],
        "containerStatuses": [{"name": container, "ready": False, "restartCount": 0, "state": {"terminated": ended}}],
    }
