import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import structlog
from aiohttp.test_utils import make_mocked_request
from kubernetes.aio.client import ApiClient, Configuration

from finetune_operator import election
from finetune_operator.__main__ import EXIT_ENVIRONMENT, READY_FRESH_SECONDS, STUCK_SECONDS, Operator, configure_logs, main
from finetune_operator.election import Election
from finetune_operator.port import ApiError, JobKey
from finetune_operator.settings import Settings


@pytest.fixture
def logs() -> Iterator[None]:
    """Logs as the operator writes them; afterwards as they were."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], level = before
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("logs")
def test_every_log_line_is_json_with_the_job_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("INFO")
    with structlog.contextvars.bound_contextvars(namespace="team", job="bot"):
        logging.getLogger("another.package").warning("lost %s of %s", 1, 2)
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            structlog.get_logger("ours").exception("that failed", pod="bot-1-head")
    logging.getLogger("another.package").debug("not told")

    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["message"], first["level"], first["logger"]) == ("lost 1 of 2", "warning", "another.package")
    assert (first["namespace"], first["job"]) == (second["namespace"], second["job"]) == ("team", "bot")
    assert second["pod"] == "bot-1-head"
    assert "RuntimeError: broken" in second["exception"]
    assert first["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "FINETUNE_TOKEN_KEY_FILE"),
        ({}, "`finetune operator --help` lists every variable"),
        (
            {"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_LEADER_ELECTION": "no"},
            "FINETUNE_LEADER_ELECTION must be true or false, not 'no'",
        ),
        ({"FINETUNE_TOKEN_KEY_FILE": "/nowhere/key"}, "FINETUNE_TOKEN_KEY_FILE: /nowhere/key cannot be read: No such file or directory"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_POLL_SECONDS": "inf"}, "FINETUNE_POLL_SECONDS must be a number, not 'inf'"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_HTTP_PORT": "80.5"}, "FINETUNE_HTTP_PORT must be a whole number, not 80.5"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_POLL_SECONDS": "soon"}, "FINETUNE_POLL_SECONDS must be a number, not 'soon'"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_HTTP_PORT": "0"}, "FINETUNE_HTTP_PORT must be larger than 0"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{key}", "FINETUNE_LOG_LEVEL": "loud"}, "FINETUNE_LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR"),
        ({"FINETUNE_TOKEN_KEY_FILE": "{short}"}, "fewer than 16 bytes"),
    ],
)
def test_wrong_environment_is_one_line_and_exit_2(
    variables: dict[str, str],
    words: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "key").write_text("a key of more than 16 bytes")
    (folder / "short").write_text("short")
    for name in (
        "FINETUNE_TOKEN_KEY_FILE",
        "FINETUNE_POLL_SECONDS",
        "FINETUNE_HTTP_PORT",
        "FINETUNE_LEADER_ELECTION",
        "FINETUNE_LOG_LEVEL",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(key=folder / "key", short=folder / "short"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_ENVIRONMENT
    told = capsys.readouterr().err
    assert told.startswith("finetune-operator: ")
    assert words in told
    assert len(told.splitlines()) == 1


async def probe(operator: Operator, path: str) -> tuple[int, str]:
    """What the kubelet is told; asked of the handlers, without a port."""
    response = await (operator._healthz if path == "/healthz" else operator._readyz)(make_mocked_request("GET", path))
    return response.status, response.text or ""


async def test_operator_is_healthy_until_a_reconcile_is_stuck() -> None:
    operator = Operator(Settings())
    operator._begun[JobKey("team", "quick")] = time.monotonic()
    assert await probe(operator, "/healthz") == (200, "ok\n")
    operator._begun[JobKey("team", "bot")] = time.monotonic() - STUCK_SECONDS - 1
    assert await probe(operator, "/healthz") == (500, "reconcile stuck: team/bot\n")


async def test_leader_that_could_not_renew_is_not_healthy_and_a_standby_is() -> None:
    operator = Operator(Settings())
    operator.election = Election(ApiClient(Configuration(host="http://127.0.0.1:1")), "system", "me")
    operator.election._lock.last_contact -= election.LEASE_SECONDS + 1
    assert (await probe(operator, "/healthz"))[0] == 200
    operator.election.leading.set()
    status, words = await probe(operator, "/healthz")
    assert status == 500
    assert "the Lease was not renewed" in words


async def test_operator_is_not_ready_before_it_watches() -> None:
    assert await probe(Operator(Settings()), "/readyz") == (503, "not watching yet\n")


JOBS = {"u-1": JobKey("team", "bot"), "u-2": JobKey("team", "cat"), "u-3": JobKey("team", "resting")}


async def test_replica_that_stands_by_queues_nothing_and_takes_up_every_job_that_does_not_rest_when_it_leads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two:
        answers: ClassVar[list[Any]] = [ApiError(0, "Unreachable", "not now"), JOBS]

        async def survey(self, namespaces: Sequence[str]) -> tuple[dict[str, JobKey], set[str]]:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return dict(answer), {"u-3"}

    monkeypatch.setattr("finetune_operator.__main__.CRD_RETRY_SECONDS", 0)
    monkeypatch.setattr("finetune_operator.__main__.survey", Two.survey)
    operator = Operator(Settings())
    operator._cluster = Two()  # type: ignore[assignment]
    operator.election = Election(ApiClient(Configuration(host="http://127.0.0.1:1")), "system", "me")
    resync = asyncio.create_task(operator._resync())
    operator._wake(JobKey("team", "bot"), True)
    await asyncio.sleep(0)
    assert len(operator.queue) == 0
    operator.election.leading.set()
    for _ in range(10):
        await asyncio.sleep(0)
    operator._wake(JobKey("team", "dog"), True)
    assert len(operator.queue) == 3
    resync.cancel()


async def test_after_a_turn_that_all_are_given_each_comes_due_at_a_time_of_its_own_and_then_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def reconcile(*_: object) -> float:
        return 10.0

    monkeypatch.setattr("finetune_operator.__main__.reconcile", reconcile)
    monkeypatch.setattr("random.random", lambda: 0.25)
    operator, key = Operator(Settings()), JobKey("team", "bot")
    operator._cluster = None  # type: ignore[assignment]
    operator._listed.add(key)
    assert [await operator._reconcile(key) for _ in range(3)] == [2.5, 10.0, 10.0]


class Counting:
    """An API server of which only the number of questions is known."""

    def __init__(self) -> None:
        self.asked = 0

    async def check(self, namespaces: Sequence[str]) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        raise ApiError(0, "Unreachable", f"no answer {self.asked}")


async def test_many_who_ask_whether_it_is_ready_are_one_request_to_the_api_server() -> None:
    operator, cluster = Operator(Settings()), Counting()
    operator._watching, operator._cluster = True, cluster  # type: ignore[assignment]
    answers = await asyncio.gather(*(probe(operator, "/readyz") for _ in range(20)))
    assert set(answers) == {(503, "the API server does not answer: no answer 1\n")}
    operator._answer = (operator._answer[0] - READY_FRESH_SECONDS - 1, operator._answer[1])
    assert await probe(operator, "/readyz") == (503, "the API server does not answer: no answer 2\n")


def test_leader_has_stopped_before_another_may_lead() -> None:
    """The last renewal may begin just before the deadline, and take a read and a write."""
    assert election.RENEW_SECONDS + 2 * election.CALL_SECONDS < election.LEASE_SECONDS
