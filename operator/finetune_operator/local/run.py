"""`finetune local JOB.yaml`: one job from its manifest to an exit code.

0    the job is Complete                       129, 130, 143   ended by hang-up, Ctrl-C or SIGTERM; the same command without --fresh resumes
1    the job Failed                            124             --timeout was reached; the same
2    it could not start: the manifest, what it refers to, or another run
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune_api import API_VERSION, KIND
from finetune_api.status import MonitoringStatus, Status
from finetune_api.v1alpha1 import Spec, parse_job
from finetune_operator.local.cluster import LocalCluster, Machine
from finetune_operator.local.inputs import Given, InputError, Inputs, local_path, missing_files, place, read_inputs, with_absolute_files
from finetune_operator.local.state import JobFile, State, StateError
from finetune_operator.local.view import Lines, Screen, View, failure, summary
from finetune_operator.monitoring import acting
from finetune_operator.port import JobKey
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import Settings
from finetune_operator.times import rfc3339
from finetune_operator.words import monitoring_lines

EXIT_COMPLETE, EXIT_FAILED, EXIT_NOT_STARTED, EXIT_TIMEOUT = 0, 1, 2, 124
GRACE_SECONDS = 40
"""Time that a pod gets to save a checkpoint; 10 s of it are Ray's."""
LOOK_SECONDS = 0.25
_STEERING = ("suspend", "monitoring", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
"""Fields of a spec that may change while the job exists."""
_GPU = "nvidia.com/gpu"


@dataclass(frozen=True)
class Options:
    """What the command line says beside the manifest."""

    state: Path | None = None
    """Folder for claims, logs and pods; default is `.finetune` beside the manifest."""
    given: Given = field(default_factory=Given)
    worker_cpus: int | None = None
    """CPUs for each worker; default is an equal share of this machine's, or less where the job asks for less."""
    timeout: float | None = None
    """Seconds after which the job is suspended."""
    fresh: bool = False
    """Forget an earlier run of the job and begin anew."""
    logs: bool = False
    """Print what the head writes."""
    measure: bool = False
    """Measure what the job has published again, in place of running it."""


def run_local(path: Path, options: Options | None = None, *, machine: Machine | None = None, console: Console | None = None) -> int:
    """Run the job of a manifest on this machine until it ends, and return the exit code."""
    console = console or Console()
    options = options or Options()
    state = State((options.state or path.parent / ".finetune").resolve())
    try:
        inputs = read_inputs(path, options.given, os.environ)
        if inputs.job.spec.suspend:
            raise InputError(f"{path}: spec.suspend is true, so there is nothing to run; remove it")
        machine = machine or Machine(gpus=find_gpus(os.environ))
        _check_gpus(path, inputs.job.spec, machine)
        state.prepare()
        with state.locked(inputs.job.metadata.name):
            place(inputs, options.given, state)
            if faults := missing_files(inputs, path, state):
                raise InputError("\n".join(faults))
            return asyncio.run(_Run(path, inputs, options, state, machine, console).go())
    except (InputError, StateError) as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        return EXIT_NOT_STARTED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


class _Run:
    """One run: the job's file, its pods, the screen."""

    def __init__(self, path: Path, inputs: Inputs, options: Options, state: State, machine: Machine, console: Console) -> None:
        self._inputs, self._options, self._state, self._console = inputs, options, state, console
        self._folder = path.parent.resolve()
        self._meta = inputs.job.metadata
        self._file = JobFile(path.parent / f"{self._meta.name}.status.yaml")
        self._cluster = LocalCluster(state, self._file, self._on_this_machine(machine), machine)
        self._interrupts: list[int] = []
        self._warnings: tuple[str, ...] = ()
        self._abort = asyncio.Event()
        self._view: View = Lines(console)

    async def go(self) -> int:
        """Run to the end."""
        self._say_notes()
        if self._options.measure:
            return await self._measure()
        fresh = self._admit()
        if fresh:
            await self._cluster.end_left_overs(self._meta.name, 0)
            self._cluster.forget_pods(self._meta.name)
        elif self._status().phase == "Complete":
            self._view.note(f"{self._meta.name} is complete already; --fresh runs it anew")
            return self._tell_end(self._status())
        with self._signals():
            left = [] if fresh else await self._cluster.end_left_overs(self._meta.name, GRACE_SECONDS)
            if left:
                self._view.note(f"ended what an earlier run had left: {', '.join(left)}")
            if self._console.is_terminal:
                self._view = Screen(self._console, self._meta.name)
            try:
                status = await self._drive()
            finally:
                self._view.close()
                await self._cluster.end_now()
        return self._tell_end(status)

    async def _measure(self) -> int:
        """One measuring run of what the job has published, whatever its schedule says. Raises InputError where there is none to make."""
        stored, plan = self._file.load(), self._inputs.job.spec.monitoring
        status = self._status()
        if stored is None or status.phase != "Complete" or not status.artifacts or _changed(stored, self._inputs.job.spec):
            raise InputError(f"{self._meta.name} has published nothing here, or its spec has changed since: run `finetune local` first")
        if plan is None:
            raise InputError("spec.monitoring is not set: it names the suites that are measured again, and their fresh data")
        self._admit()
        await self._cluster.end_left_overs(self._meta.name, 0)
        self._warnings = status.warnings  # which the job's own run has told
        known = status.monitoring or MonitoringStatus()
        run = known.run and known.run.model_copy(update={"end_time": known.run.end_time or _now()})
        due = known.model_copy(update={"next_run_time": _now(), "schedule": plan.schedule, "run": run})
        self._file.save({**(self._file.load() or {}), "status": status.model_copy(update={"monitoring": due}).to_json()})
        with self._signals():
            try:
                status = await self._drive()
            finally:
                await self._cluster.end_now()
        for line in monitoring_lines(status):
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)
        held = status.condition("Degraded")
        return EXIT_COMPLETE if held is not None and held.status == "False" else EXIT_FAILED

    def _admit(self) -> bool:
        """Store the job as the API server would, or go on with the stored one. Returns whether it is a new job. Raises InputError."""
        stored = self._file.load()
        if stored is not None and stored["metadata"].get("namespace") != self._meta.namespace:
            raise InputError(f"{self._file.path} belongs to a job of another namespace; use --state and another folder for the manifest")
        if stored is None or self._options.fresh:
            self._store_new()
            return True
        changed = _changed(stored, self._inputs.job.spec)
        phase = (stored.get("status") or {}).get("phase")
        if phase == "Failed" or (phase == "Complete" and changed):
            self._view.note(f"{self._meta.name} has ended before ({phase}); this is a new run")
            self._store_new()
            return True
        if changed:
            fields = ", ".join(f"spec.{name}" for name in changed)
            raise InputError(f"{fields} changed since this job began, and a spec is immutable: undo that, or begin anew with --fresh")
        spec = _dump(self._inputs.job.spec)
        if spec != stored["spec"]:
            meta = {**stored["metadata"], "generation": stored["metadata"].get("generation", 1) + 1}
            self._file.save({**stored, "metadata": meta, "spec": spec})
        return False

    def _store_new(self) -> None:
        meta = {
            "name": self._meta.name,
            "namespace": self._meta.namespace,
            "uid": str(uuid.uuid4()),
            "generation": 1,
            "creationTimestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "labels": dict(self._meta.labels),
        }
        self._file.save({"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": _dump(self._inputs.job.spec)})

    async def _drive(self) -> Status:
        """The loop, as the operator runs it, for one job."""
        settings = Settings(
            local=True, token_key=self._state.token_key(), grace_seconds=GRACE_SECONDS, poll_seconds=LOOK_SECONDS, retry_base_seconds=2.0
        )
        key = JobKey(self._meta.namespace, self._meta.name)
        end = time.monotonic() + self._options.timeout if self._options.timeout else None
        follow = _Follower(self._state, self._view) if self._options.logs else None
        while not self._abort.is_set():
            self._cluster.changed.clear()
            await reconcile(key, self._cluster, settings, datetime.now(UTC))
            status = self._status()
            self._view.update(status)
            self._tell_new_warnings(status)
            if follow:
                follow.look(f"{self._meta.name}-{acting(status).attempt.number}-head")
            raw = await self._cluster.read(key)
            if raw is None or (status.phase in ("Complete", "Failed", "Suspended") and _settled(raw.pods, raw.config_maps)):
                break
            if end is not None and time.monotonic() >= end and not self._interrupts:
                self._interrupts.append(0)
                self._view.note(f"--timeout of {self._options.timeout:g} s is reached: suspending after a checkpoint")
                self._cluster.suspend()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cluster.changed.wait(), LOOK_SECONDS)
        return self._status()

    def _tell_new_warnings(self, status: Status) -> None:
        for warning in status.warnings:
            if warning not in self._warnings:
                self._view.note(f"warning: {warning}")
        self._warnings = status.warnings

    def _tell_end(self, status: Status) -> int:
        name, job = self._meta.name, self._inputs.job
        if status.phase == "Complete":
            parts = summary(name, status, job.spec.model.source, self._here)
        elif status.phase == "Failed":
            pod = f"{name}-{status.attempt.number}-head"
            parts = failure(name, status, self._state.log(pod), self._cluster.log_tail(pod), self._here)
        else:
            how = "suspended" if status.phase == "Suspended" else "ended"
            again = "the same command without --fresh" if self._options.fresh else "the same command"
            self._view.note(f"{name} is {how}; {again} goes on from the last checkpoint")
            return EXIT_TIMEOUT if self._interrupts == [0] else 128 + (self._interrupts or [signal.SIGINT])[-1]
        for part in parts:
            self._console.print(part, soft_wrap=True)
        return EXIT_COMPLETE if status.phase == "Complete" else EXIT_FAILED

    def _here(self, uri: str) -> Path | None:
        """Where a URI leads on this machine, as short as it can be said from where the user is."""
        path, start = local_path(uri, self._state, self._folder), Path.cwd()
        return path.relative_to(start) if path and path.is_relative_to(start) else path

    def _status(self) -> Status:
        return Status.model_validate((self._file.load() or {}).get("status") or {})

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal suspends the job, the second ends everything at once."""
        loop = asyncio.get_running_loop()
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in wanted:
            loop.add_signal_handler(number, self._interrupt, int(number))
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)

    def _interrupt(self, number: int) -> None:
        first = not self._interrupts
        self._interrupts.append(number)
        if first:
            self._view.note("suspending: a checkpoint is saved; once more ends at once")
            self._cluster.suspend()
        else:
            self._abort.set()
            self._cluster.changed.set()

    def _on_this_machine(self, machine: Machine) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """The stored job as this machine runs it: whole paths of files, no more CPUs than there are, no GPUs where there are none."""
        cores = os.cpu_count() or 1

        def view(job: dict[str, Any]) -> dict[str, Any]:
            spec = with_absolute_files(job["spec"], self._folder)
            compute = spec.get("compute", {})
            share = max(1, cores // compute.get("workers", {}).get("max", 1))
            resources = {name: value for name, value in compute.get("resourcesPerWorker", {}).items() if name != _GPU or machine.gpus}
            asked = self._inputs.job.spec.compute.resources_per_worker.get("cpu")
            resources["cpu"] = self._options.worker_cpus or min(share, max(1, round(_cpus(asked))) if asked else share)
            return {**job, "spec": {**spec, "compute": {**compute, "resourcesPerWorker": resources}}}

        return view

    def _say_notes(self) -> None:
        spec = self._inputs.job.spec
        for note in self._inputs.notes:
            self._view.note(note)
        if spec.compute.resources_per_worker.get(_GPU) and not find_gpus(os.environ):
            self._view.note("this machine has no GPU: training on the CPU")


class _Follower:
    """Prints what a log has more of since the last look."""

    def __init__(self, state: State, view: View) -> None:
        self._state, self._view = state, view
        self._read: dict[str, int] = {}

    def look(self, pod: str) -> None:
        """Print the new whole lines of a pod's log."""
        try:
            with self._state.log(pod).open("rb") as file:
                file.seek(self._read.get(pod, 0))
                lines, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._read[pod] = self._read.get(pod, 0) + len(lines) + len(newline)
        for line in lines.decode(errors="replace").splitlines():
            self._view.note(line)


def find_gpus(env: Mapping[str, str]) -> tuple[str, ...]:
    """GPUs of this machine, or of those the ones that CUDA_VISIBLE_DEVICES leaves."""
    if "CUDA_VISIBLE_DEVICES" in env:
        return tuple(gpu for gpu in env["CUDA_VISIBLE_DEVICES"].split(",") if gpu and gpu != "-1")
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(found.stdout.split())


def _check_gpus(path: Path, spec: Spec, machine: Machine) -> None:
    """Raises InputError where the job wants more GPUs than there are; none at all means training on the CPU, where that can be."""
    kind = spec.model.quantization
    if kind != "none" and not machine.gpus:
        raise InputError(
            f"{path}: spec.model.quantization {kind} needs a GPU, and this machine shows none (nvidia-smi, CUDA_VISIBLE_DEVICES);"
            " set it to none, or run the job where there is one"
        )
    wanted = int(_cpus(spec.compute.resources_per_worker.get(_GPU, 0))) * spec.compute.workers.max
    if machine.gpus and wanted > len(machine.gpus):
        raise InputError(
            f"{path}: spec.compute asks for {wanted} GPUs ({spec.compute.workers.max} workers), this machine has {len(machine.gpus)};"
            " lower workers.max or resourcesPerWorker"
        )


def _now() -> str:
    return rfc3339(datetime.now(UTC))


def _cpus(quantity: int | str) -> float:
    """A Kubernetes quantity of CPUs or GPUs as a number: 2, "500m", "1.5"."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text.rstrip("kKMGTi"))


def _dump(spec: Spec) -> dict[str, Any]:
    """A spec as the API server would store it, with every default in place."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def _changed(stored: Mapping[str, Any], spec: Spec) -> list[str]:
    """Fields of the stored spec that the manifest now says otherwise, and that must not change."""
    old = _dump(parse_job({key: value for key, value in stored.items() if key != "status"}, local=True).spec)
    new = _dump(spec)
    return [name for name in sorted(old.keys() | new.keys()) if name not in _STEERING and old.get(name) != new.get(name)]


def _settled(pods: list[dict[str, Any]], config_maps: list[dict[str, Any]]) -> bool:
    """Whether nothing runs any more, and what belonged to the attempts is gone."""
    return not config_maps and all(pod["status"]["phase"] in ("Succeeded", "Failed") for pod in pods)
