"""The head's HTTP server: the report by long poll, the workers' progress, the metrics, and whose token counts."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.trainer.harness import free_ports

from finetune_api.status import Metric, Progress
from finetune_trainer.progress import Answer, ProgressSender, WorkerProgress
from finetune_trainer.report import Reporter, ReportServer

TOKEN = "secret-of-this-attempt"


class Head:
    """A server on a free port, and what the workers told it."""

    def __init__(self) -> None:
        self.reporter = Reporter("uid-1", 3, clock=lambda: "2026-01-01T00:00:00Z")
        self.told: list[WorkerProgress] = []
        self.heard = threading.Event()
        self.stop = False
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = ReportServer(self.reporter, TOKEN, self.port, self.take)

    def take(self, progress: WorkerProgress) -> Answer:
        self.told.append(progress)
        self.heard.set()
        return Answer(stop=self.stop)

    def call(self, path: str, *, token: str | None = TOKEN, body: Any = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method="GET" if data is None else "PUT")  # noqa: S310 - http always
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def head() -> Iterator[Head]:
    made = Head()
    made.server.start()
    yield made
    made.server.stop()


def test_the_report_is_answered_at_once_when_it_is_newer(head: Head) -> None:
    status, body = head.call("/report?after=0&wait=60")
    assert status == 200
    assert json.loads(body)["jobUid"] == "uid-1"
    assert json.loads(body)["attempt"] == 3


def test_a_long_poll_ends_with_the_change(head: Head) -> None:
    """It was asked for with a minute to wait; the change alone can end it before the test's own limit."""
    answers: list[str] = []
    poll = threading.Thread(target=lambda: answers.append(head.call("/report?after=1&wait=60")[1]))
    poll.start()
    head.reporter.start_stage("Prepare", "checking", workers_wanted=0)
    poll.join(timeout=30)
    assert json.loads(answers[0])["revision"] == 2
    assert json.loads(answers[0])["message"] == "checking"


def test_without_a_change_the_same_report_comes_after_the_wait(head: Head) -> None:
    assert json.loads(head.call("/report?after=1&wait=0.01")[1])["revision"] == 1


def test_a_head_waits_for_its_last_report_to_be_read_by_whoever_follows_it(head: Head) -> None:
    assert not head.server.wait_read(60)  # nobody has ever asked: it does not wait a minute
    head.call("/report")
    assert head.server.wait_read(0)
    head.reporter.finish("Succeeded", "published")
    assert not head.server.wait_read(0.01)
    reader = threading.Timer(0.05, head.call, ["/report"])
    reader.start()
    assert head.server.wait_read(60)
    reader.join()


@pytest.mark.parametrize("token", [None, "", "another", TOKEN + "x", TOKEN[:-1]])
@pytest.mark.parametrize(("path", "body"), [("/report", None), ("/progress", {"group": "g"})])
def test_only_the_token_opens_the_report(head: Head, token: str | None, path: str, body: Any) -> None:
    assert head.call(path, token=token, body=body)[0] == 401
    assert head.told == []


@pytest.mark.parametrize("query", ["after=x", "wait=long", "after=1.5", "wait=nan"])
def test_a_wrong_question_is_refused(head: Head, query: str) -> None:
    assert head.call(f"/report?{query}")[0] == 400


def test_progress_is_taken_and_the_answer_says_whether_to_stop(head: Head) -> None:
    assert head.call("/progress", body={"group": "g", "step": 4, "totalSteps": 9}) == (200, '{"stop": false, "regroup": false}')
    head.stop = True
    assert head.call("/progress", body={"group": "g", "step": 5, "totalSteps": 9}) == (200, '{"stop": true, "regroup": false}')
    assert [progress.step for progress in head.told] == [4, 5]


@pytest.mark.parametrize("body", [{}, {"group": "g", "step": -1}, {"group": "g" * 100}, []])
def test_progress_of_another_form_is_refused(head: Head, body: Any) -> None:
    assert head.call("/progress", body=body)[0] == 400
    assert head.told == []


def test_the_sender_delivers_the_newest_and_hears_the_stop(head: Head) -> None:
    head.stop = True
    sender = ProgressSender(head.url, TOKEN, interval=0.01)
    sender.post(WorkerProgress(group="g", step=7))
    assert head.heard.wait(30)
    sender.post(WorkerProgress(group="g", step=8))
    sender.close()
    assert head.told[0].step == 7
    assert head.told[-1].step == 8
    assert sender.stop_requested


def test_the_sender_asks_no_proxy(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody,) = free_ports(1)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would remember the environment of the tests before
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{nobody}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    sender = ProgressSender(head.url, TOKEN, interval=0.01)
    sender.post(WorkerProgress(group="g", step=7))
    sender.close()
    assert [progress.step for progress in head.told][-1:] == [7]


def test_a_head_that_is_gone_neither_blocks_nor_breaks_the_sender() -> None:
    (port,) = free_ports(1)
    sender = ProgressSender(f"http://127.0.0.1:{port}", TOKEN, interval=0.01)
    sender.post(WorkerProgress(group="g"))
    sender.close()
    assert not sender.stop_requested


def test_metrics_need_no_token_and_show_what_is_known(head: Head) -> None:
    before = head.call("/metrics", token=None)[1]
    assert "finetune_training_attempt 3.0" in before
    assert "finetune_training_loss" not in before
    head.reporter.update(
        progress=Progress(percent=25, step=30, total_steps=120, epoch=0.5, last_update_time="2026-01-01T00:00:10Z"),
        metrics=(Metric(name="train/loss", value=1.25, step=30), Metric(name="validation/loss", value=2.5, step=20)),
    )
    head.reporter.start_stage("Train", "training", workers_wanted=2)
    lines = head.call("/metrics", token=None)[1].splitlines()
    for line in (
        "finetune_training_step 30.0",
        "finetune_training_steps_planned 120.0",
        "finetune_training_progress_ratio 0.25",
        "finetune_training_loss 1.25",
        "finetune_training_eval_loss 2.5",
        "finetune_training_heartbeat_timestamp_seconds 1.76722561e+09",
        'finetune_training_stage{stage="Train"} 1.0',
    ):
        assert line in lines
    assert not any("Prepare" in line for line in lines)
    assert head.call("/healthz", token=None) == (200, "ok\n")


def test_a_stage_ends_those_before_it() -> None:
    first, second, third = (f"2026-01-01T00:00:0{second}Z" for second in range(3))
    times = iter([first, second, third])
    reporter = Reporter("u", 1, clock=lambda: next(times))
    reporter.start_stage("Prepare", "", workers_wanted=0)
    reporter.start_stage("Train", "", workers_wanted=2)
    assert [(stage.name, stage.state, stage.start_time, stage.end_time) for stage in reporter.report.stages] == [
        ("Prepare", "Succeeded", first, second),
        ("Train", "Running", second, None),
        ("Evaluate", "Pending", None, None),
        ("Publish", "Pending", None, None),
    ]
    reporter.finish("Failed", "no")
    assert [stage.state for stage in reporter.report.stages] == ["Succeeded", "Failed", "Pending", "Pending"]
    assert (reporter.report.workers_wanted, reporter.report.revision, reporter.report.outcome) == (0, 4, "Failed")


def test_a_job_that_asks_for_more_stages_has_them_in_their_order() -> None:
    reporter = Reporter("u", 1, stages=("Prepare", "Search", "Train", "Evaluate", "Publish"), clock=lambda: "2026-01-01T00:00:00Z")
    reporter.start_stage("Search", "", workers_wanted=2)
    assert [(stage.name, stage.state) for stage in reporter.report.stages[:3]] == [
        ("Prepare", "Succeeded"),
        ("Search", "Running"),
        ("Train", "Pending"),
    ]
    reporter.start_stage("Train", "", workers_wanted=2)
    assert [stage.state for stage in reporter.report.stages] == ["Succeeded", "Succeeded", "Running", "Pending", "Pending"]


def test_an_interrupted_stage_has_no_end() -> None:
    reporter = Reporter("u", 1, clock=lambda: "2026-01-01T00:00:00Z")
    reporter.start_stage("Train", "", workers_wanted=2)
    reporter.finish("Interrupted", "stopped")
    assert [stage.state for stage in reporter.report.stages] == ["Succeeded", "Running", "Pending", "Pending"]
