"""The commands that people steer jobs with, against an API server of a few lines."""

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from tests.unit.operator_edges.job_file import JOB
from typer.testing import CliRunner

from finetune_operator import completion
from finetune_operator.cli import app

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/team/finetunejobs"
BOT = {"metadata": {"name": "bot", "namespace": "team", "uid": "u"}, "spec": {}}


@dataclass
class Server:
    """Answers by method and path, and remembers what it was asked."""

    url: str = ""
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    unknown: Any = field(default_factory=lambda: {"reason": "NotFound", "message": "not there"})
    asked: list[tuple[str, str, dict[str, list[str]], str, Any]] = field(default_factory=list)

    def changes(self) -> list[tuple[str, str, Any]]:
        return [(method, path, body) for method, path, _, _, body in self.asked if method != "GET"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    fake = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            media = self.headers.get("Content-Type", "")
            fake.asked.append((self.command, url.path, parse_qs(url.query), media, json.loads(body) if body else None))
            found = fake.answers.get((self.command, url.path))
            status, data = (404, fake.unknown) if found is None else (200, found)
            text = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PATCH = answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Nothing."""

    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    fake.url = f"http://127.0.0.1:{service.server_port}"
    contexts = [
        {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
        {"name": "elsewhere", "context": {"cluster": "c", "user": "u", "namespace": "other"}},
        {"name": "broken", "context": {"cluster": "nowhere", "user": "u"}},
    ]
    clusters = [{"name": "c", "cluster": {"server": fake.url}}, {"name": "nowhere", "cluster": {"server": "http://127.0.0.1:1"}}]
    config = {"current-context": "here", "contexts": contexts, "clusters": clusters, "users": [{"name": "u", "user": {"token": "t"}}]}
    (tmp_path / "config").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    yield fake
    service.shutdown()
    thread.join()
    service.server_close()


def run(*arguments: str, text: str | None = None) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, input=text, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


def job(phase: str, failed: str = "False", complete: str = "False", **status: Any) -> dict[str, Any]:
    """The job bot in this phase."""
    time = "2026-01-01T00:00:00Z"
    conditions = [
        {"type": kind, "status": truth, "reason": "X", "observedGeneration": 1, "lastTransitionTime": time}
        for kind, truth in (("Failed", failed), ("Complete", complete))
    ]
    return {**BOT, "status": {"phase": phase, "conditions": conditions, **status}}


@pytest.mark.parametrize(
    ("command", "patch"),
    [
        ("suspend", {"spec": {"suspend": True}}),
        ("resume", {"spec": {"suspend": False}}),
        ("cancel", {"metadata": {"annotations": {"finetune.dev/cancel": "true"}}}),
    ],
)
def test_a_job_that_lives_is_steered(server: Server, command: str, patch: Any) -> None:
    server.answers = {("GET", f"{JOBS}/bot"): job("Training"), ("PATCH", f"{JOBS}/bot"): BOT}
    assert run(command, "bot")[0] == 0
    assert server.changes() == [("PATCH", f"{JOBS}/bot", patch)]
    assert server.asked[-1][3] == "application/merge-patch+json"


@pytest.mark.parametrize("command", ["suspend", "resume", "cancel"])
def test_a_job_that_has_ended_is_not_steered(server: Server, command: str) -> None:
    server.answers = {("GET", f"{JOBS}/bot"): job("Complete", complete="True")}
    assert run(command, "bot") == (1, "bot has ended (Complete)\n")
    assert server.changes() == []


def test_a_failed_job_is_retried_with_a_new_value_and_no_longer_canceled(server: Server) -> None:
    server.answers = {("GET", f"{JOBS}/bot"): job("Failed", failed="True"), ("PATCH", f"{JOBS}/bot"): BOT}
    assert run("retry", "bot") == (0, "bot is tried again\n")
    ((_, _, body),) = server.changes()
    annotations = body["metadata"]["annotations"]
    assert annotations["finetune.dev/cancel"] is None, "a merge patch removes what is null"
    assert annotations["finetune.dev/retry"].startswith("20")
    server.answers = {("GET", f"{JOBS}/bot"): job("Training")}
    assert run("retry", "bot") == (1, "bot has not failed (Training): there is nothing to retry\n")


def test_namespace_and_context_are_those_of_kubectl(server: Server) -> None:
    for arguments, namespace in (((), "team"), (("--context", "elsewhere"), "other"), (("-n", "third", "--context", "elsewhere"), "third")):
        assert run("status", "bot", *arguments) == (
            1,
            f"there is no FineTuneJob bot in namespace {namespace}; `finetune list -A` shows all\n",
        )
    code, output = run("status", "bot", "--context", "broken")
    assert (code, "no answer from the API server (Cannot connect to host 127.0.0.1:1 " in output) == (1, True)
    code, output = run("status", "bot", "--context", "absent")
    assert (code, "absent" in output) == (1, True)


def test_a_tenants_words_are_neither_markup_nor_commands_to_the_terminal(server: Server) -> None:
    """Broken markup in one job's message would else end `finetune list` for everybody."""
    hostile = {**BOT, "status": {"message": "see [/x] [red]y \x1b]0;title\x07"}}
    server.answers = {("GET", f"{JOBS}/bot"): hostile, ("GET", "/apis/finetune.dev/v1alpha1/finetunejobs"): {"items": [hostile]}}
    for command in (("list", "-A"), ("status", "bot")):
        code, output = run(*command)
        assert code == 0
        assert "see [/x] [red]y" in output
        assert "\x1b" not in output
        assert "\x07" not in output


def test_submit_applies_server_side(server: Server, tmp_path: Path) -> None:
    server.answers = {("PATCH", f"{JOBS}/bot"): {"metadata": {"name": "bot", "generation": 1}}}
    (tmp_path / "job.yaml").write_text(JOB)
    assert run("submit", str(tmp_path / "job.yaml")) == (0, "bot submitted in namespace team\n")
    (_, path, query, media, body) = server.asked[-1]
    assert (path, query, media) == (f"{JOBS}/bot", {"fieldManager": ["finetune"], "force": ["true"]}, "application/apply-patch+yaml")
    assert body["metadata"] == {"name": "bot", "namespace": "team"}
    assert body["spec"] == yaml.safe_load(JOB)["spec"], "defaults are the API server's"
    server.answers = {("PATCH", f"{JOBS}/bot"): {"metadata": {"name": "bot", "generation": 2}}}
    assert run("submit", "-", text=JOB) == (0, "bot applied in namespace team\n")


def test_submit_on_trial_stores_nothing_and_shows_what_would_be_stored(server: Server) -> None:
    meta = {"name": "bot", "namespace": "team", "generation": 1, "uid": "u", "managedFields": [{}]}
    spec = {**yaml.safe_load(JOB)["spec"], "backoffLimit": 3}
    server.answers = {("PATCH", f"{JOBS}/bot"): {"metadata": meta, "spec": spec}}
    code, output = run("submit", "--dry-run", "-", text=JOB)
    assert code == 0
    assert output.splitlines()[:2] == ["---", "# bot would be submitted in namespace team (nothing is stored)"]
    assert yaml.safe_load(output) == {**yaml.safe_load(JOB), "metadata": {"name": "bot", "namespace": "team"}, "spec": spec}
    ((_, path, query, _, _),) = server.asked
    assert (path, query["dryRun"]) == (f"{JOBS}/bot", ["All"])
    server.answers = {("PATCH", f"{JOBS}/bot"): {"metadata": {**meta, "resourceVersion": "7"}, "spec": spec}}
    assert "# bot would be applied in namespace team" in run("submit", "--dry-run", "-", text=JOB)[1]
    server.answers, server.asked = {}, []
    assert run("submit", "--dry-run", "-", text=JOB) == (1, "finetune: cannot patch FineTuneJob team/bot: not there\n")
    assert run("submit", "--dry-run", "--wait", "-", text=JOB)[0] == 2
    assert len(server.asked) == 1


def test_a_cluster_without_the_operator_is_told_of(server: Server) -> None:
    """What an API server says of a path that it does not know: text, no object."""
    server.unknown = b"404 page not found\n"
    told = "cannot patch FineTuneJob team/bot: 404 page not found; this cluster knows no FineTuneJobs: install the operator in it"
    assert run("submit", "-", text=JOB) == (1, f"finetune: {told}\n")


def test_submit_waits_and_tells_of_the_failure(server: Server) -> None:
    failure = {"reason": "TrainingDiverged", "message": "loss is \x1b[31mNaN", "hint": "Lower training.learningRate."}
    server.answers = {("PATCH", f"{JOBS}/bot"): BOT, ("GET", f"{JOBS}/bot"): job("Failed", failed="True", failure=failure)}
    code, output = run("submit", "--wait", "-", text=JOB)
    assert code == 1
    assert "failure: TrainingDiverged: loss is " in output
    assert "what to do: Lower training.learningRate." in output
    assert "\x1b" not in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (JOB.replace("lora: {}", "lora: {rank: 0}"), "spec.method.lora.rank"),
        ("kind: ConfigMap\napiVersion: v1\n", "only FineTuneJobs are submitted"),
        (JOB.replace("name: bot", "name: bot, namespace: other"), "is for the namespace other, not team"),
    ],
)
def test_what_is_no_good_job_is_not_sent(server: Server, text: str, words: str) -> None:
    code, output = run("submit", "-", "-n", "team", text=text)
    assert (code, words in output, server.asked) == (1, True, []), output


def test_logs_have_the_role_before_each_line(server: Server) -> None:
    pods = [pod("bot-2-worker-0", 2), pod("bot-2-head", 2), pod("bot-1-head", 1), pod("bot-2-worker-1", 2, state={"waiting": {}})]
    logs = "/api/v1/namespaces/team/pods/{}/log"
    server.answers = {
        ("GET", f"{JOBS}/bot"): job("Training", attempt={"number": 2}),
        ("GET", "/api/v1/namespaces/team/pods"): {"items": pods},
        ("GET", logs.format("bot-2-head")): b"hf_abcdefghijklmnop is my token\nstep 1",
        ("GET", logs.format("bot-2-worker-0")): b"[bold]no markup[/bold]\n",
    }
    code, output = run("logs", "bot", "--tail", "5")
    assert code == 0
    head, step, worker = output.splitlines()
    assert head.startswith("head     | ")
    assert "hf_abc" not in head
    assert (step, worker) == ("head     | step 1", "worker-0 | [bold]no markup[/bold]")
    assert [query for _, path, query, _, _ in server.asked if path.endswith("/log")] == [{"tailLines": ["5"]}] * 2


def test_logs_are_followed_until_the_job_has_ended(server: Server) -> None:
    server.answers = {
        ("GET", f"{JOBS}/bot"): job("Complete", complete="True", attempt={"number": 1}),
        ("GET", "/api/v1/namespaces/team/pods"): {"items": [pod("bot-1-head", 1, state={"terminated": {}})]},
        ("GET", "/api/v1/namespaces/team/pods/bot-1-head/log"): b"done\n",
    }
    assert run("logs", "-f", "bot") == (0, "head     | done\n")
    assert run("logs", "-f", "absent")[0] == 1


def pod(name: str, attempt: int, state: Any = None) -> dict[str, Any]:
    labels = {"finetune.dev/attempt": str(attempt)}
    status = {"containerStatuses": [{"state": state if state is not None else {"running": {}}}]}
    return {"metadata": {"name": name, "namespace": "team", "uid": name, "labels": labels}, "status": status}


def test_kubectl_completes_commands_and_names(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    server.answers = {("GET", JOBS): {"items": [{"metadata": {"name": name, "namespace": "team"}} for name in ("bot", "bat", "cat")]}}
    assert proposed(monkeypatch, capfd, "s") == ["submit", "status", "suspend", ":4"]
    assert proposed(monkeypatch, capfd, "status", "b") == ["bot", "bat", ":4"]
    assert proposed(monkeypatch, capfd, "status", "--context", "broken", "b") == [":4"]


def proposed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> list[str]:
    monkeypatch.setattr("sys.argv", ["kubectl_complete-finetune", *words])
    for name in ("_FINETUNE_COMPLETE", "COMP_WORDS", "COMP_CWORD"):
        monkeypatch.setenv(name, "")
    completion.main()
    return capfd.readouterr().out.split()
