"""Secrets of a job, each of its own, and all that comes out of the job: none of them is there, whatever servers and files say.

They may stand in the mounted Secrets, in the attempt's token file, and in the requests to whom they are for; nowhere else.
"""

import io
import secrets
import threading
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tenacity
from tests.echoing import ANSWERS, EchoingServer
from tests.in_process import NoRay, without_ray
from tests.integration.trainer.harness import free_ports
from tests.tiny_llama import make_tiny_llama, write_questions
from tests.unit.trainer.fake_endpoint import FakeEndpoint, chat
from tests.unit.trainer.fake_hub import FakeHub, lead_to
from tests.unit.trainer.fake_s3 import FakeS3
from tests.unit.trainer_run.test_whole_loop import a_job

from finetune_api.report import EXIT_FAILED, EXIT_SUCCEEDED, Report, parse_report
from finetune_trainer import endpoint, head, sources
from finetune_trainer.environment import Environment
from finetune_trainer.report import ReportServer

TOLD = "tell-nobody"
"""Stands in every canary."""
SERVED = {"model": "large", "secretRef": {"name": "mine"}}


def canary() -> str:
    """A secret of no known shape, so that nothing but knowing it can hide it."""
    return f"{TOLD}-{secrets.token_hex(6)}"


@dataclass(frozen=True)
class Outcome:
    """What a head left behind."""

    code: int
    report: Report
    texts: dict[str, str]
    """Everything that came out, by where."""

    def telling(self) -> dict[str, str]:
        """The places that hold a canary, and what stands around it."""
        found = {where: text.find(TOLD) for where, text in self.texts.items()}
        return {where: self.texts[where][max(place - 80, 0) : place + 80] for where, place in found.items() if place >= 0}


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    claim = tmp_path / "claims" / "data"
    make_tiny_llama(claim / "model")
    write_questions(claim / "train.jsonl", 12)
    write_questions(claim / "validation.jsonl", 4, start=100)
    (claim / "manual.md").write_text("# Loans\nA tool may be kept for 14 days.\n")
    (tmp_path / "claims" / "job").mkdir()
    monkeypatch.setattr(endpoint, "RETRY_WAIT", tenacity.wait_none())
    monkeypatch.setattr(sources, "RETRY_WAIT", tenacity.wait_none())
    return tmp_path


def give(volumes: Path, name: str, **keys: str) -> None:
    """Mount a Secret."""
    folder = volumes / "secrets" / name
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in keys.items():
        (folder / key).write_text(value)


def run_the_head(volumes: Path, patch: pytest.MonkeyPatch, attempt: int = 1, **spec: Any) -> Outcome:
    """Run a job's head and its workers in this process, to their end."""
    job, folder, token = a_job("job", **spec), volumes / "attempts" / str(attempt), canary()
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(job.model_dump_json(by_alias=True, exclude_none=True))
    (folder / "token").write_text(token)
    (port,) = free_ports(1)
    log = folder / "termination"
    environment = Environment(folder / "job.json", attempt, folder / "token", "127.0.0.1", 1, port, volumes, log, local=True)
    servers: list[ReportServer] = []
    without_ray(patch, environment, folder)
    patch.setattr(head, "RayHead", NoRay)
    patch.setattr(head, "ray_variables", lambda _: {})
    patch.setattr(head, "LINGER_SECONDS", 0.0)
    start = ReportServer.start
    patch.setattr(ReportServer, "start", lambda self: (servers.append(self), start(self)))
    printed, complained = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(complained):
        code = head.run_head(environment)
    patch.setattr(ReportServer, "start", start)
    pages = {page: page_of(port, page, token) for page in ("/report", "/metrics")}
    servers[0].stop()
    texts = {**pages, "termination": log.read_text(), "log": printed.getvalue(), "stderr": complained.getvalue()}
    report = parse_report(pages["/report"])
    assert report is not None
    return Outcome(code, report, texts | files_in(volumes / "claims"))


def page_of(port: int, page: str, token: str) -> str:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{page}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=10) as response:  # noqa: S310
        return str(response.read().decode())


def files_in(folder: Path) -> dict[str, str]:
    """Every file's bytes as text, and the names of them all."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {f"file {path}": path.read_bytes().decode(errors="replace") for path in files} | {"names": "\n".join(map(str, files))}


def judged(url: str) -> dict[str, Any]:
    suite = {"name": "task", "source": "validation", "metrics": ["judgeWinRate"], "judge": {"endpoint": {"url": f"{url}/v1", **SERVED}}}
    return {"evaluation": {"suites": [suite]}, "baseline": {"prompts": [{"name": "plain"}]}}


def made(url: str) -> dict[str, Any]:
    preparation = {
        "questions": {"knowledgeBase": {"source": "pvc://data/manual.md"}, "generator": {"endpoint": {"url": f"{url}/v1", **SERVED}}}
    }
    return {"data": {"validation": {"source": "pvc://data/validation.jsonl"}, "preparation": preparation}}


def taught(url: str) -> dict[str, Any]:
    return {"objective": {"distillation": {"teacher": {"endpoint": {"url": f"{url}/v1", **SERVED}}, "response": {}}}}


def data(source: str) -> dict[str, Any]:
    return {"data": {"train": {"source": source, "secretRef": {"name": "mine"}}, "validation": {"source": "pvc://data/validation.jsonl"}}}


WHO = {
    "model of a hub": lambda url: {"model": {"source": "hf://owner/name", "secretRef": {"name": "mine"}}},
    "file of a hub": lambda url: data("hf://datasets/owner/name/data.jsonl"),
    "data set of a hub": lambda url: data("hf://datasets/owner/name"),
    "data in S3": lambda url: data("s3://bucket/train.jsonl"),
    "model in S3": lambda url: {"model": {"source": "s3://bucket/model", "secretRef": {"name": "mine"}}},
    "storage in S3": lambda url: {"output": {"storage": "s3://bucket/out", "secretRef": {"name": "mine"}}},
    "judge": judged,
    "generator": made,
    "teacher": taught,
}
"""Who is sent a secret, and the part of a spec that does so."""


@pytest.mark.parametrize("who", WHO)
def test_a_server_that_repeats_a_secret_is_not_quoted(who: str, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine that are sent a secret, and seven ways to answer: as many canaries, and as many more for the keys of S3 that are never sent."""
    for attempt, (how, answer) in enumerate(ANSWERS.items(), 1):
        key, unsent = canary(), canary()
        with EchoingServer(answer) as server, monkeypatch.context() as patch:
            give(volumes, "mine", token=key, accessKeyId=key, secretAccessKey=unsent, endpoint=server.url)
            lead_to(server.url, volumes / "cache", patch)
            patch.setattr("time.sleep", lambda _: None)
            outcome = run_the_head(volumes, patch, attempt, **WHO[who](server.url))
            assert key in server.heard, f"{who}, {how}: the server was never asked"
        assert outcome.code == EXIT_FAILED, f"{who}, {how}"
        assert outcome.report.failure is not None
        assert not outcome.telling(), f"{who}, {how}: {outcome.report.failure.message}"


def test_a_job_that_succeeds_leaves_no_secret(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated model, a storage in S3, a judge: their keys are used, and are in no report, page, log or artifact."""
    keys = {name: canary() for name in ("hub", "access", "secret", "judge")}
    hub = FakeHub({path.name: path.read_bytes() for path in (volumes / "claims/data/model").iterdir()}, {})
    hub.needs_token, hub.token = True, keys["hub"]
    s3 = FakeS3()
    s3.access_key = keys["access"]
    for server in (hub, s3):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    give(volumes, "hub", token=keys["hub"])
    give(volumes, "s3", accessKeyId=keys["access"], secretAccessKey=keys["secret"], endpoint=s3.endpoint)
    give(volumes, "judge", token=keys["judge"])
    with FakeEndpoint(lambda path, body: (200, {}, chat("Verdict: A"))) as judge:
        suite = {"name": "task", "source": "validation", "metrics": ["judgeWinRate"], "maxNewTokens": 4}
        suite["judge"] = {"endpoint": {"url": judge.url, "model": "large", "secretRef": {"name": "judge"}}}
        lead_to(hub.url, volumes / "cache", monkeypatch)
        outcome = run_the_head(
            volumes,
            monkeypatch,
            model={"source": "hf://owner/name", "secretRef": {"name": "hub"}},
            output={"storage": "s3://bucket/out", "secretRef": {"name": "s3"}},
            training={"epochs": 1, "globalBatchSize": 4, "maxSequenceLength": 64, "precision": "float32", "packing": False},
            evaluation={"suites": [suite]},
        )
        assert {key for _, _, key in judge.asked} == {f"Bearer {keys['judge']}"}
    for server in (hub, s3):
        server.shutdown()
        server.server_close()
    assert outcome.code == EXIT_SUCCEEDED, outcome.texts["log"]
    assert f"Bearer {keys['hub']}" in hub.tokens
    assert any(name.startswith("out/adapter/") for name in s3.objects)
    assert "README.md" in "".join(s3.objects)
    outcome.texts.update({f"object {name}": data.decode(errors="replace") for name, data in s3.objects.items()})
    assert not outcome.telling()


SHAPES = (
    "Authorization: Bearer {}",
    "https://user:{}@models.example/v1",
    "s3://bucket/key?X-Amz-Signature={}",
    "AWS_SECRET_ACCESS_KEY={}",
    "sk-{}",
)
"""What can be known for a secret by what stands around it."""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_secret_in_a_row_is_not_in_what_is_said_of_the_row(shape: str, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is no JSON, one whose column is named so, one whose value is of the wrong kind: the job fails, and says which line."""
    text, file = shape.format(canary()), volumes / "claims" / "data" / "own.jsonl"
    rows = (
        f'{{"prompt": "{text}", "completion": ',
        f'{{"prompt": "a", "{text}": "b"}}',
        f'{{"prompt": {{"{text}": 1}}, "completion": "b"}}',
    )
    for attempt, row in enumerate(rows, 1):
        file.write_text('{"prompt": "a", "completion": "b"}\n' + row + "\n")
        with monkeypatch.context() as patch:
            outcome = run_the_head(volumes, patch, attempt, data={"train": {"source": "pvc://data/own.jsonl"}})
        assert outcome.code == EXIT_FAILED
        assert outcome.report.failure is not None
        assert "line 2" in outcome.report.failure.message
        outcome.texts.pop(f"file {file}")
        assert not outcome.telling(), outcome.report.failure.message
