"""Which TuningProfile a job runs under, what the profile forbids it, and what it gives to it. Pure.

A job's first reconcile chooses; what the profile then says is kept in status.resolved.profile, and everything later follows from that:
`effective` gives the spec that runs, from the job's own and the kept profile.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.allow_list import allows
from finetune_api.compute import Compute, Toleration, covers
from finetune_api.endpoint_bounds import EndpointBounds
from finetune_api.fields import LOCAL_RUN
from finetune_api.profile import DEFAULT_PROFILE, TuningProfile, parse_profile
from finetune_api.profile_fields import NAME_WORD, NAMESPACE_WORD
from finetune_api.references import Reference, references_of
from finetune_api.resolved_profile import ResolvedAllowed, ResolvedProfile
from finetune_api.scrub import scrub
from finetune_api.sources import Output, SecretReference
from finetune_api.status import Status
from finetune_api.v1alpha1 import Spec
from finetune_operator.manifest import explain
from finetune_operator.queue_names import queue_violations
from finetune_operator.settings import Settings

_NOT_GPUS = ("rdma/",)
"""Devices that compute nothing."""
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Offered:
    """The profiles of the cluster."""

    profiles: tuple[TuningProfile, ...] = ()
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Names of those that this operator does not understand, with what is wrong with them."""
    broken_default: str | None = None
    """One of these that is a default: to go on without it would be to pass round it."""


@dataclass(frozen=True)
class Choice:
    """The profile of a job, or why there is none yet. Neither: it runs without one."""

    profile: TuningProfile | None = None
    how: str = ""
    problem: str = ""


def offered(raw: Iterable[Mapping[str, Any]]) -> Offered:
    """The profiles in raw objects."""
    profiles, unreadable, broken_default = [], {}, None
    for each in raw:
        try:
            profiles.append(parse_profile(each))
        except ValidationError as error:
            name = str(each["metadata"]["name"])
            unreadable[name] = scrub("; ".join(explain(error)))
            if (each["metadata"].get("annotations") or {}).get(DEFAULT_PROFILE) == "true":
                broken_default = name
    return Offered(tuple(sorted(profiles, key=lambda profile: profile.metadata.name)), unreadable, broken_default)


def choose(spec: Spec, found: Offered, settings: Settings) -> Choice:
    """The profile that the job names, else the default one. Of several defaults it is the newest, as for StorageClasses."""
    if spec.profile_ref is not None:
        name = spec.profile_ref.name
        profile = next((each for each in found.profiles if each.metadata.name == name), None)
        return Choice(profile, "named by the job") if profile else Choice(problem=_absent(name, found))
    if found.broken_default is not None:
        return Choice(problem=_absent(found.broken_default, found))
    newest_first = sorted(found.profiles, key=lambda each: each.metadata.creation_timestamp or "", reverse=True)
    defaults = [each for each in newest_first if each.is_default]
    if defaults:
        names = ", ".join(each.metadata.name for each in defaults[:_NAMES_SHOWN])
        return Choice(defaults[0], "the default" if len(defaults) == 1 else f"the newest of the default profiles {names}")
    if settings.require_profile:
        return Choice(problem=f"a TuningProfile must be named in spec.profileRef.name; {_known(found)}")
    return Choice()


def _absent(name: str, found: Offered) -> str:
    if name in found.unreadable:
        return f"the TuningProfile {name} cannot be understood: {found.unreadable[name]}"
    return f"there is no TuningProfile {name} (spec.profileRef.name); {_known(found)}"


def _known(found: Offered) -> str:
    names = [profile.metadata.name for profile in found.profiles]
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"the cluster has {', '.join(names[:_NAMES_SHOWN])}{more}" if names else "the cluster has none"


def snapshot(profile: TuningProfile, how: str, spec: Spec, namespace: str, name: str) -> ResolvedProfile:
    """What the job keeps of the profile."""
    given, limits, output = profile.spec, profile.spec.limits, profile.spec.output
    placed = spec.output.storage is None and output is not None
    storage = output.storage.replace(NAMESPACE_WORD, namespace).replace(NAME_WORD, name) if placed and output else None
    return ResolvedProfile(
        name=profile.metadata.name,
        generation=profile.metadata.generation,
        chosen=how,
        trainer_image=given.trainer_image,
        head_cpu=given.head.cpu,
        head_memory=given.head.memory,
        node_selector=given.compute.node_selector,
        tolerations=given.compute.tolerations,
        resources_per_worker=given.compute.resources_per_worker,
        queue=given.queue,
        storage=storage,
        storage_secret=output.secret_ref.name if placed and output and output.secret_ref else None,
        active_deadline_seconds=limits.active_deadline_seconds,
        max_gpu_hours=limits.max_gpu_hours,
        allow=ResolvedAllowed(
            models=given.allow.models,
            data=given.allow.data,
            storage=given.allow.storage,
            endpoints=given.allow.endpoints,
            s3_endpoints=given.allow.s3_endpoints,
            queues=given.allow.queues,
        ),
        allow_remote_code=given.allow_remote_code,
    )


def violations(spec: Spec, labels: Mapping[str, str], kept: ResolvedProfile, profile: TuningProfile) -> tuple[str, ...]:
    """What a job asks for beyond its profile, each with the field, the limit and both values. `kept` is the profile's snapshot for it."""
    return (
        *_size_violations(spec, merged(spec, kept).compute, profile),
        *_choice_violations(spec, profile),
        *_placement_violations(spec, profile),
        *queue_violations(labels, kept),
        *_task_violations(spec, profile),
        *uri_violations(spec, profile.metadata.name, profile.spec.allow),
    )


def _size_violations(spec: Spec, compute: Compute, profile: TuningProfile) -> Iterator[str]:
    """`compute` is what the job would get."""
    limits, within = profile.spec.limits, f"the profile {profile.metadata.name} allows"
    workers, gpus = compute.workers.max, compute.workers.max * gpus_of(compute)
    if limits.workers is not None and workers > limits.workers:
        yield f"spec.compute.workers.max is {workers}, and {within} at most {limits.workers} (limits.workers)"
    if limits.gpus is not None and gpus > limits.gpus:
        yield f"spec.compute asks for {gpus} GPUs ({workers} workers), and {within} at most {limits.gpus} (limits.gpus)"
    seconds, most = spec.active_deadline_seconds, limits.active_deadline_seconds
    if most is not None and seconds is not None and seconds > most:
        yield f"spec.activeDeadlineSeconds is {seconds}, and {within} at most {most} (limits.activeDeadlineSeconds)"
    hours, budget = spec.max_gpu_hours, limits.max_gpu_hours
    if budget is not None and hours is not None and hours > budget:
        yield f"spec.maxGpuHours is {hours:g}, and {within} at most {budget:g} (limits.maxGpuHours)"


def _choice_violations(spec: Spec, profile: TuningProfile) -> Iterator[str]:
    allow, within = profile.spec.allow, f"the profile {profile.metadata.name} allows"
    if allow.methods is not None and spec.method.chosen not in allow.methods:
        yield f"spec.method is {spec.method.chosen}, and {within} {', '.join(allow.methods)} (allow.methods)"
    objective = spec.objective.chosen
    if allow.objectives is not None and objective not in allow.objectives:
        yield f"spec.objective is {objective}, and {within} {', '.join(allow.objectives)} (allow.objectives)"
    if spec.model.trust_remote_code and not profile.spec.allow_remote_code:
        yield f"spec.model.trustRemoteCode is true, and the profile {profile.metadata.name} does not allow it (allowRemoteCode)"


def _placement_violations(spec: Spec, profile: TuningProfile) -> Iterator[str]:
    """Nodes that a job asks for. What the profile gives anyway may be named, too."""
    given, allow, name = profile.spec.compute, profile.spec.allow, profile.metadata.name
    for key, value in spec.compute.node_selector.items():
        if given.node_selector.get(key, value) != value:
            wanted = given.node_selector[key]
            yield f"spec.compute.nodeSelector has {key}={value}, and the profile {name} allows {wanted} (compute.nodeSelector)"
        elif allow.node_selector_keys is not None and key not in (*given.node_selector, *allow.node_selector_keys):
            yield f"spec.compute.nodeSelector names {key}, which the profile {name} does not allow (allow.nodeSelectorKeys)"
    if allow.tolerations is None:
        return
    for index, each in enumerate(spec.compute.tolerations):
        if not any(covers(wider, each) for wider in (*allow.tolerations, *given.tolerations)):
            yield f"spec.compute.tolerations[{index}] is {_written(each)}, which the profile {name} does not allow (allow.tolerations)"


def _written(toleration: Toleration) -> str:
    fields = toleration.model_dump(by_alias=True, exclude_none=True)
    return "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def gpus_of(compute: Compute) -> int:
    """Devices of one worker: whatever its vendor calls it, a device is there to compute, unless it is known to do something else."""
    devices = {name: amount for name, amount in compute.resources_per_worker.items() if "/" in name and not name.startswith(_NOT_GPUS)}
    return sum(int(amount) for amount in devices.values())


def _task_violations(spec: Spec, profile: TuningProfile) -> Iterator[str]:
    """lm-eval's tasks read data of their own, of which no URI tells."""
    allow = profile.spec.allow
    if allow.lm_eval_tasks is None and allow.data is None:
        return
    for index, suite in enumerate(spec.evaluation.suites):
        for task in suite.lm_eval.tasks if suite.lm_eval else ():
            if task not in (allow.lm_eval_tasks or ()):
                yield (
                    f"spec.evaluation.suites[{index}].lmEval names the task {task}, which the profile {profile.metadata.name} does not "
                    "allow (allow.lmEvalTasks)"
                )


_LISTS = {"model": "models", "data": "data", "storage": "storage", "endpoint": "endpoints"}


def uri_violations(spec: Spec, profile: str, allow: Any) -> Iterator[str]:  # noqa: ANN401 - Allowed, or what is kept of it
    """Every place that the spec names and the allow-list does not. `allow` has the lists models, data, storage and endpoints."""
    for reference in references_of(spec):
        listed = _LISTS[reference.use]
        if reference.uri is not None and not allows(getattr(allow, listed), reference.uri):
            yield f"{reference.field} names {reference.uri}, which the profile {profile} does not allow (allow.{listed})"
        elif getattr(allow, listed) is not None and _is_pull_request(reference):
            yield f"{reference.field}.revision is {reference.revision}: anyone can open a pull request: the profile {profile} allows none"


def endpoint_bounds(spec: Spec, status: Status) -> EndpointBounds | None:
    """What the head has to hold the Secrets of an effective spec against: whoever may name an S3 server has any bucket mean what he likes.

    Those of s3:// URIs that an allow-list bounds; None where there are none, or the profile is that of an operator of before.
    """
    kept = status.resolved.profile if status.resolved else None
    if kept is None or kept.allow.s3_endpoints is None:
        return None
    bounded = (each for each in references_of(spec) if getattr(kept.allow, _LISTS[each.use]) is not None)
    secrets = {each.secret for each in bounded if each.secret is not None and (each.uri or "").startswith("s3://")}
    return EndpointBounds(profile=kept.name, secrets=tuple(sorted(secrets)), allowed=kept.allow.s3_endpoints) if secrets else None


def _is_pull_request(reference: Reference) -> bool:
    return (reference.revision or "").lower().startswith("refs/pr/")


def remote_code_without_profile(spec: Spec) -> str:
    """What is wrong with a job that runs under no profile and wants its model's code to run; empty where it does not."""
    if not spec.model.trust_remote_code:
        return ""
    return "spec.model.trustRemoteCode is true, which needs a TuningProfile that says allowRemoteCode, and the job runs under none"


def effective(spec: Spec, status: Status, *, local: bool = False) -> Spec:
    """The spec that runs: the job's own with what its profile gives and bounds. Applied twice it gives the same.

    On this machine (`local`) the profile was worked in before, if there was one. One that has begun under no profile runs no model's code.
    """
    kept = status.resolved.profile if status.resolved else None
    if kept is not None:
        return merged(spec, kept)
    if local or status.attempt.number == 0 or not spec.model.trust_remote_code:
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"trust_remote_code": False})})


def merged(spec: Spec, kept: ResolvedProfile) -> Spec:
    """The job's spec with what a profile gives. What the job itself names stands, but for node selectors and limits."""
    compute = spec.compute.model_copy(
        update={
            "node_selector": {**spec.compute.node_selector, **kept.node_selector},
            "tolerations": tuple({repr(each): each for each in (*spec.compute.tolerations, *kept.tolerations)}.values()),
            "resources_per_worker": {**kept.resources_per_worker, **spec.compute.resources_per_worker},
        }
    )
    trusted = spec.model.trust_remote_code and kept.allow_remote_code
    return spec.model_copy(
        update={
            "profile_ref": None,
            "model": spec.model.model_copy(update={"trust_remote_code": trusted}),
            "compute": compute,
            "output": _placed(spec.output, kept),
            "active_deadline_seconds": _least(spec.active_deadline_seconds, kept.active_deadline_seconds),
            "max_gpu_hours": _least(spec.max_gpu_hours, kept.max_gpu_hours),
            # It may be changed at any time, so it is looked at each time.
            "monitoring": None if monitoring_violations(spec, kept) else spec.monitoring,
        }
    )


def monitoring_violations(spec: Spec, kept: ResolvedProfile) -> tuple[str, ...]:
    """What of spec.monitoring goes beyond the profile."""
    if spec.monitoring is None:
        return ()
    return tuple(each for each in uri_violations(spec, kept.name, kept.allow) if each.startswith("spec.monitoring."))


def left_out(spec: Spec, status: Status) -> str:
    """Why `effective` leaves spec.monitoring out of a spec; empty where it does not."""
    kept = status.resolved.profile if status.resolved else None
    return "; ".join(monitoring_violations(spec, kept)) if kept else ""


def _placed(output: Output, kept: ResolvedProfile) -> Output:
    if output.storage is not None or kept.storage is None:
        return output
    secret = SecretReference(name=kept.storage_secret) if kept.storage_secret else None
    return output.model_copy(update={"storage": kept.storage, "secret_ref": output.secret_ref or secret})


_Number = TypeVar("_Number", int, float)


def _least(asked: _Number | None, most: _Number | None) -> _Number | None:
    return most if asked is None else asked if most is None else min(asked, most)


def problem_of(spec: Spec, *, local: bool = False) -> str:
    """What is wrong with an effective spec by the rules of every spec; empty where nothing is."""
    try:
        text = spec.model_dump_json(by_alias=True, exclude_none=True)
        Spec.model_validate_json(text, by_alias=True, by_name=False, context=LOCAL_RUN if local else None)
    except ValidationError as error:
        return scrub("; ".join(explain(error)))
    return ""


def as_offered(settings: Settings, status: Status) -> Settings:
    """The settings with what the job's profile says in their place: the image, and the size of the head."""
    kept = status.resolved.profile if status.resolved else None
    if kept is None:
        return settings
    cpu, memory = kept.head_cpu, kept.head_memory
    return replace(
        settings,
        trainer_image=kept.trainer_image or settings.trainer_image,
        head_cpu=settings.head_cpu if cpu is None else str(cpu),
        head_memory=settings.head_memory if memory is None else str(memory),
    )
