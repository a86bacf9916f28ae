"""Each manifest in examples/methods and examples/objectives runs on the tiny model, and what it publishes loads elsewhere."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.example_jobs import RUNNABLE
from tests.in_process import run_job
from tests.unit.docs.markdown import ROOT

from finetune_api.v1alpha1 import parse_job
from finetune_operator.manifest import read_manifests

TEACHER = ROOT / "examples/methods/lora.yaml"
EXAMPLES = [path for path in RUNNABLE if path.parent.name in ("methods", "objectives")]
ENDPOINT_KEY = "an-endpoints-key"
TEACHER_UID = "teacher-of-the-examples"
LOADS = """
import sys, json, importlib, pathlib
base, folder, prompt = sys.argv[1:]
assert not [name for name in sys.modules if name.startswith("finetune")]
from transformers import AutoModelForCausalLM, AutoTokenizer
if (pathlib.Path(folder) / "adapter_config.json").exists():
    sys.path.insert(0, folder)
    if list(pathlib.Path(folder).glob("*.py")):
        importlib.import_module(next(pathlib.Path(folder).glob("*.py")).stem)
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
assert not [name for name in sys.modules if name.startswith("finetune")]
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
made = model.generate(**ids, max_new_tokens=40, do_sample=False)
print(json.dumps(tokenizer.decode(made[0][ids["input_ids"].shape[1] :], skip_special_tokens=True)))
"""


class Teacher(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that knows one answer."""

    asked: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        allowed = self.headers.get("Authorization") == f"Bearer {ENDPOINT_KEY}"
        self.asked.append(body)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Ask the teacher. - Tarnwick Care"}}
        answer = json.dumps({"choices": [choice]} if allowed else {"error": {"message": "no"}}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def taught(volumes: Path) -> Path:
    """The claim after examples/methods/lora.yaml has run, whose merged model is the teacher of the distillation examples."""
    with pytest.MonkeyPatch.context() as patch:
        run_job(_job(TEACHER, uid=TEACHER_UID), volumes, patch)
    return volumes


def _job(path: Path, uid: str, **teacher: str) -> Any:
    (manifest,) = read_manifests(path.read_text(encoding="utf-8"))
    manifest["metadata"]["uid"] = uid
    if teacher:
        manifest["spec"]["objective"]["distillation"]["teacher"]["endpoint"] |= teacher
    if uid != TEACHER_UID:
        manifest["spec"]["output"]["storage"] += "-again"
    return parse_job(manifest, local=True)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_what_it_publishes_loads_elsewhere(
    path: Path, taught: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = taught / "secrets/teacher"
    secret.mkdir(parents=True, exist_ok=True)
    (secret / "token").write_text(ENDPOINT_KEY)
    job = _job(path, path.stem, **({"url": endpoint} if "endpoint" in path.stem else {}))

    done = run_job(job, taught, monkeypatch)

    losses = done.losses()
    assert sum(losses[-3:]) / 3 < losses[0]
    report = done.report
    assert {artifact.kind for artifact in report.artifacts} == set(job.spec.artifacts)
    assert report.model is not None
    assert 0 < report.model.trained_parameters <= report.model.parameters
    figures = {result.metric: (result.baseline, result.value) for result in report.evaluation.results} if report.evaluation else {}
    before, after = figures["validation/loss"]
    assert before is not None
    assert after is not None
    if "endpoint" not in path.stem:  # which teaches other answers than the validation data has
        assert after < before
    claims = taught / "claims"
    for artifact in report.artifacts:
        folder = claims / artifact.uri.removeprefix("pvc://")
        command = [sys.executable, "-c", LOADS, str(claims / "quickstart/models/tiny-llama"), str(folder), "I get error code E07."]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env={"PATH": "", "HF_HUB_OFFLINE": "1"})
        assert made.returncode == 0, made.stderr[-2000:]
        assert json.loads(made.stdout.splitlines()[-1]).strip()
