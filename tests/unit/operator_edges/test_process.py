import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from finetune_operator import election
from finetune_operator.__main__ import EXIT_ENVIRONMENT, configure_logs, main


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
        logging.getLogger("a.library").warning("lost %s of %s", 1, 2)
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            structlog.get_logger("ours").exception("that failed", pod="bot-1-head")
    logging.getLogger("a.library").debug("not told")

    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["message"], first["level"], first["logger"]) == ("lost 1 of 2", "warning", "a.library")
    assert (first["namespace"], first["job"]) == (second["namespace"], second["job"]) == ("team", "bot")
    assert second["pod"] == "bot-1-head"
    assert "RuntimeError: broken" in second["exception"]
    assert first["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "FINETUNE_TOKEN_KEY_FILE"),
        ({"FINETUNE_TOKEN_KEY_FILE": "/nowhere/key"}, "/nowhere/key"),
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
    for name in ("FINETUNE_TOKEN_KEY_FILE", "FINETUNE_POLL_SECONDS", "FINETUNE_HTTP_PORT", "FINETUNE_LOG_LEVEL"):
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


def test_leader_has_stopped_before_another_may_lead() -> None:
    """The last renewal may begin just before the deadline, and take a read and a write."""
    assert election.RENEW_SECONDS + 2 * election.CALL_SECONDS < election.LEASE_SECONDS
