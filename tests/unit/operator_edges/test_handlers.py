"""What the informer does with an event; kopf itself is tried against a real API server in the integration tests."""

from typing import Any

import kopf
import pytest

from finetune_operator.handlers import informer_registry
from finetune_operator.port import JobKey
from finetune_operator.watching import watch_settings


class Informed:
    """The handlers of a registry, called as kopf calls them."""

    def __init__(self) -> None:
        self.woken: list[JobKey] = []
        self.listed: list[JobKey] = []
        """Those of them that nothing has happened to."""
        self.seen: list[tuple[str, bool]] = []
        self.registry = informer_registry(self.wake, lambda job, gone: self.seen.append((job["metadata"]["name"], gone)), self.login)

    def wake(self, key: JobKey, happened: bool) -> None:
        self.woken.append(key)
        if not happened:
            self.listed.append(key)

    async def login(self) -> dict[str, Any]:
        return {"server": "https://api", "token": "t"}

    async def send(self, handler: str, kind: str | None, obj: dict[str, Any]) -> None:
        (found,) = (each for each in self.registry._watching.get_all_handlers() if each.id == handler)
        await found.fn(event={"type": kind, "object": obj})


@pytest.fixture
def informed() -> Informed:
    return Informed()


def job(**meta: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "team", "name": "bot", "uid": "u-1", "generation": 1, **meta}, "status": {}}


async def test_job_is_woken_when_it_appears_changes_and_goes(informed: Informed) -> None:
    await informed.send("job", None, job())
    await informed.send("job", "MODIFIED", job(generation=2))
    await informed.send("job", "MODIFIED", job(generation=2, labels={"a": "b"}))
    await informed.send("job", "MODIFIED", job(generation=2, labels={"a": "b"}, deletionTimestamp="2026-01-01T00:00:00Z"))
    await informed.send("job", "DELETED", job())
    assert informed.woken == [JobKey("team", "bot")] * 5
    assert informed.listed == [JobKey("team", "bot")]  # the first, which has no type
    assert informed.seen == [("bot", False)] * 4 + [("bot", True)]


async def test_echo_of_a_status_wakes_nobody_but_is_seen(informed: Informed) -> None:
    await informed.send("job", "ADDED", job(resourceVersion="1"))
    await informed.send("job", "MODIFIED", {**job(resourceVersion="2"), "status": {"phase": "Training"}})
    assert len(informed.woken) == 1
    assert len(informed.seen) == 2


async def test_a_profile_wakes_the_jobs_that_have_not_begun_and_no_others(informed: Informed) -> None:
    begun = {**job(name="begun", uid="u-2"), "status": {"attempt": {"number": 1}}}
    for each in job(), begun, job(name="gone", uid="u-3"):
        await informed.send("job", "ADDED", each)
    await informed.send("job", "DELETED", job(name="gone", uid="u-3"))
    informed.woken.clear()
    await informed.send("profile", "ADDED", {"metadata": {"name": "small"}})
    assert informed.woken == [JobKey("team", "bot")]
    await informed.send("job", "MODIFIED", {**job(), "status": {"attempt": {"number": 1}}})
    await informed.send("profile", "MODIFIED", {"metadata": {"name": "small"}})
    assert informed.woken == [JobKey("team", "bot")]


async def test_second_job_of_a_name_is_woken_too(informed: Informed) -> None:
    await informed.send("job", "ADDED", job())
    await informed.send("job", "ADDED", job(uid="u-2"))
    assert len(informed.woken) == 2


async def test_pod_wakes_its_job(informed: Informed) -> None:
    pod = {
        "metadata": {"namespace": "team", "name": "bot-1-head", "labels": {"finetune.dev/job-name": "bot", "finetune.dev/job-uid": "u-1"}}
    }
    await informed.send("pod", "MODIFIED", pod)
    assert informed.woken == [JobKey("team", "bot")]


def complete(**meta: Any) -> dict[str, Any]:
    return {**job(**meta), "spec": {}, "status": {"observedGeneration": 1, "conditions": [{"type": "Complete", "status": "True"}]}}


async def test_a_job_that_is_listed_when_it_has_ended_waits_for_the_survey_and_one_that_changes_does_not(informed: Informed) -> None:
    await informed.send("job", None, complete())
    assert (informed.woken, informed.seen) == ([], [("bot", False)])
    await informed.send("job", "MODIFIED", complete(annotations={"finetune.dev/retry": "1"}))
    await informed.send("job", "ADDED", complete(uid="u-2"))
    assert informed.woken == [JobKey("team", "bot")] * 2


@pytest.mark.parametrize(
    ("kind", "role", "phase", "wakes"),
    [
        (None, "head", "Succeeded", False),
        ("MODIFIED", "head", "Succeeded", True),
        ("DELETED", "head", "Succeeded", True),
        (None, "head", "Running", True),
        (None, "worker", "Succeeded", True),
    ],
)
async def test_a_head_that_is_listed_when_it_has_ended_wakes_nobody(
    informed: Informed, kind: str | None, role: str, phase: str, wakes: bool
) -> None:
    labels = {"finetune.dev/job-name": "bot", "finetune.dev/job-uid": "u-1", "finetune.dev/role": role}
    pod = {"metadata": {"namespace": "team", "name": "bot-1-head", "labels": labels}, "status": {"phase": phase}}
    await informed.send("pod", kind, pod)
    assert informed.woken == ([JobKey("team", "bot")] if wakes else [])


async def test_pod_with_an_empty_label_wakes_nobody(informed: Informed) -> None:
    """The path of a job without a name is that of the list of all."""
    labels = {"finetune.dev/job-name": "", "finetune.dev/job-uid": ""}
    await informed.send("pod", "ADDED", {"metadata": {"namespace": "team", "name": "x", "labels": labels}})
    assert informed.woken == []


def test_registry_holds_nothing_that_marks_objects(informed: Informed) -> None:
    registry = informed.registry
    assert not registry._changing.get_all_handlers(), "change detection writes annotations"
    assert not registry._spawning.get_all_handlers(), "timers and daemons add a finalizer"
    assert len(registry._watching.get_all_handlers()) == 3
    assert registry is not kopf.get_default_registry()


def test_kopf_only_watches_and_is_patient() -> None:
    settings = watch_settings()
    assert not settings.posting.enabled
    assert settings.scanning.disabled
    assert settings.peering.standalone
    assert settings.networking.enforce_retry_after
    delays = settings.networking.error_backoffs
    assert not isinstance(delays, float)
    assert sum(delays) >= 30 * 60, "an API server that is away for half an hour must not end the operator"
