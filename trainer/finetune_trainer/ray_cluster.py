"""Ray's processes: the head as a child of this process, the workers as this process itself, and who has joined."""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api.reasons import Reason
from finetune_api.scrub import telling_lines
from finetune_api.v1alpha1 import Compute, FineTuneJob
from finetune_trainer.environment import Environment, scratch_folder
from finetune_trainer.errors import JobError

OBJECT_STORE_BYTES = 100 * 1024 * 1024
"""Ray's shared memory on each node: nothing of size passes through it."""
SCRATCH_VARIABLE = "FINETUNE_SCRATCH"
"""Tells the processes of a worker node its folder."""
START_SECONDS = 120.0
LEAVE_SECONDS = 10.0
GROUP_SECONDS = 15
"""Ray waits so long for the nodes that a group is to be on, then counts again: one that was lost is noticed only after a while."""
SETTLE_SECONDS = 30.0
"""With enough workers for the start, the others are waited for this long."""
_PR_SET_PDEATHSIG = 1
_SUFFIXES = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(value: int | str) -> float:
    """A Kubernetes quantity as a number: '500m' is 0.5."""
    text = str(value)
    suffix = text.lstrip("0123456789.")
    return float(text.removesuffix(suffix)) * _SUFFIXES.get(suffix, 1.0)


def cpus_of(compute: Compute) -> int:
    """CPUs of a worker pod, at least one for each of its processes."""
    return max(processes_of(compute), math.ceil(quantity(compute.resources_per_worker.get("cpu", 1))))


def gpus_of(compute: Compute) -> int:
    """GPUs of a worker pod, whoever made them."""
    return int(sum(quantity(value) for name, value in compute.resources_per_worker.items() if name.endswith("/gpu")))


def processes_of(compute: Compute) -> int:
    """Processes that train in a worker pod: one for each GPU, or one alone."""
    return max(1, gpus_of(compute))


def head_command(environment: Environment, scratch: Path) -> list[str]:
    """`ray start` for the head: it coordinates and takes no work."""
    address = "127.0.0.1" if environment.local else socket.gethostbyname(socket.gethostname())
    return [
        *_ray_start(environment),
        "--head",
        f"--port={environment.ray_port}",
        f"--node-ip-address={address}",
        f"--temp-dir={scratch}",
        "--num-cpus=0",
        "--num-gpus=0",
        "--include-dashboard=false",
        "--no-monitor",
    ]


def worker_command(environment: Environment, compute: Compute, scratch: Path) -> list[str]:
    """`ray start` for a worker: it joins the head and stays until it is told to go."""
    return [
        *_ray_start(environment),
        f"--address={environment.ray_address}",
        f"--temp-dir={scratch}",
        f"--num-cpus={cpus_of(compute)}",
        f"--num-gpus={gpus_of(compute)}",
        *(["--node-ip-address=127.0.0.1"] if environment.local else []),
    ]


def _ray_start(environment: Environment) -> list[str]:
    """What head and workers share. Several local nodes share an address, so the system chooses their ports."""
    return [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--block",
        "--disable-usage-stats",
        "--include-log-monitor=false",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *(["--min-worker-port=0", "--max-worker-port=0"] if environment.local else []),
    ]


def ray_variables(environment: Environment) -> dict[str, str]:
    """The environment of Ray's processes and of its driver: token authentication always, quiet, and quick to see a lost worker."""
    return {
        **environment.variables,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(environment.token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GROUP_SECONDS),
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def become_worker(environment: Environment, job: FineTuneJob) -> None:
    """Turn this process into a Ray worker node: Ray itself is then process 1 of the pod and hears SIGTERM. Does not return.

    Workers that share a machine get a folder each: Ray would give two that start at once the same socket.
    """
    scratch = scratch_folder(job.metadata.uid, environment.attempt) / str(os.getpid())
    command = worker_command(environment, job.spec.compute, scratch)
    os.execve(command[0], command, {**ray_variables(environment), SCRATCH_VARIABLE: str(scratch)})  # noqa: S606 - this is the point


class RayHead:
    """The Ray head: started at once, needed later. It ends with this process, however that ends."""

    def __init__(self, environment: Environment, scratch: Path) -> None:
        self._environment = environment
        scratch.mkdir(parents=True, exist_ok=True)
        self._log = scratch / "head.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                head_command(environment, scratch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ray_variables(environment),
                process_group=0,  # a Ctrl-C is for this process, which then says what is to be done
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - before any other thread is started
            )

    def wait_ready(self) -> None:
        """Until the head takes connections. Raises JobError (InternalError) with Ray's last words where it does not."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if b"This command will now block" in self._log.read_bytes():
                return
            time.sleep(0.1)
        words = telling_lines(self._log.read_text(errors="replace"))
        raise JobError(Reason.INTERNAL_ERROR, f"the Ray head did not start: {' / '.join(words[-3:])}")

    def stop(self) -> None:
        """End Ray's processes; the kernel ends those below. Nothing in them is worth a farewell."""
        self._process.kill()
        self._process.wait()


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: no orphans, not even after kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def driver(environment: Environment) -> Iterator[None]:
    """Be the driver of the cluster. Left before the cluster ends: Ray kills a driver whose cluster is gone."""
    import ray

    address = "127.0.0.1" if environment.local else socket.gethostbyname(socket.gethostname())
    ray.init(address=f"{address}:{environment.ray_port}", log_to_driver=False, logging_level="WARNING")
    try:
        yield
    finally:
        # In a thread of its own: where another thread still waits for workers that are gone, it may take for ever.
        leaving = threading.Thread(target=ray.shutdown, name="leave", daemon=True)
        leaving.start()
        leaving.join(timeout=LEAVE_SECONDS)


def wait_for_workers(compute: Compute, seconds: float, tell: Callable[[int], None]) -> int:
    """The number of worker nodes that the training starts with: all that were asked for, or enough of them after a while.

    `tell` hears how many have joined. Raises JobError (WorkersLost) after `seconds` with too few.
    """
    started = time.monotonic()
    enough_since: float | None = None
    joined = -1
    while True:
        now, before = time.monotonic(), joined
        joined = nodes_joined()
        if joined != before:
            tell(joined)
        if joined >= compute.workers.max:
            return compute.workers.max
        if joined < compute.workers.min:
            enough_since = None
        elif enough_since is None:
            enough_since = now
        elif now - enough_since > SETTLE_SECONDS:
            return joined
        if now - started > seconds and joined < compute.workers.min:
            raise JobError(Reason.WORKERS_LOST, f"{joined} of at least {compute.workers.min} workers joined within {seconds:.0f} s")
        time.sleep(0.2)


def nodes_joined() -> int:
    """Worker nodes that are there to stay: one that is about to go counts no more."""
    import ray
    from ray._private.state import state  # the one place where Ray tells, and where Ray Train itself asks

    nodes: list[Mapping[str, Any]] = ray.nodes()
    going = state.get_draining_nodes()
    return sum(1 for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0 and node["NodeID"] not in going)


class Growth:
    """Whether more workers than take part have joined, and stayed."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._since: float | None = None

    def is_due(self, processes: int) -> bool:
        """Whether to begin again with more of them than this many processes. False for a job that is not elastic: Ray is not asked then."""
        workers, taking_part = self._compute.workers, processes // processes_of(self._compute)
        if not workers.min <= taking_part < workers.max or nodes_joined() <= taking_part:
            self._since = None
            return False
        now = time.monotonic()
        self._since = self._since or now
        return now - self._since > SETTLE_SECONDS
