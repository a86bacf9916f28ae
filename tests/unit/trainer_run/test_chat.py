"""The base and the tuned model answer side by side: of a job at any time of its life, and of folders."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from tests.tiny_llama import make_tiny_llama
from tests.unit.trainer_run.test_loop import DATA, Listener, manifest_with
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.v1alpha1 import parse_job
from finetune_trainer.chat import chat, storage_of
from finetune_trainer.loop import Models, Task, train
from finetune_trainer.manifest import write_manifest
from finetune_trainer.model import load_model
from finetune_trainer.model_files import fetch_model
from finetune_trainer.sources import Mounts
from finetune_trainer.worker import Worker

PROMPT = "7 ends in "


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that was killed while it published: checkpoints and a result are there."""
    root = tmp_path_factory.mktemp("job")
    make_tiny_llama(root / "model", width=16)
    manifest = manifest_with(root / "model", {"lora": {"rank": 2}}, epochs=2, learningRate=0.05)
    manifest["spec"]["output"] = {"storage": f"file://{root}/out"}
    (root / "job.json").write_text(json.dumps({**manifest, "status": {}}))
    job = parse_job(manifest, local=True)
    mounts = Mounts(root, local=True)
    files = fetch_model(job.spec.model, mounts, root, weights=True)
    own = storage_of(job, mounts).at(".finetune/u")
    config = {"method": json.loads(job.spec.method.model_dump_json(by_alias=True, exclude_none=True))}
    task = Task(job, files.base, config, own)
    assert train(task, Models(load_model(files, job, torch.device("cpu"))), DATA, Worker(), Listener())
    return root


def asked(*arguments: str) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=100)
    code = chat([*arguments, "--tokens", "8"], console, ["\n", f"{PROMPT}\n"])
    return code, console.file.getvalue()  # type: ignore[attr-defined]


def plain(model: Any, folder: Path) -> str:
    """What transformers says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def cells(shown: str) -> list[str]:
    """The answers of the last table."""
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    return [cell.strip() for cell in rows[-1].strip("│").split("│")]


def visible(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).strip()


def expected(job: Path) -> list[str]:
    base = AutoModelForCausalLM.from_pretrained(job / "model")
    before = plain(base, job / "model")
    tuned = PeftModel.from_pretrained(base, str(job / "out/.finetune/u/result/adapter"))
    after = plain(tuned, job / "model")
    assert before != after
    return [visible(before), visible(after)]


def test_a_job_that_has_not_published_answers_with_what_waits(job: Path) -> None:
    code, shown = asked("--job", str(job / "job.json"))
    assert code == 0
    assert "tuned (not published)" in shown
    assert PROMPT.strip() in shown
    assert cells(shown) == expected(job)


def test_a_job_that_trains_answers_with_its_newest_checkpoint(job: Path) -> None:
    (job / "out/.finetune/u/result").rename(job / "out/.finetune/u/aside")
    try:
        code, shown = asked("--job", str(job / "job.json"), "--prompt", PROMPT)
    finally:
        (job / "out/.finetune/u/aside").rename(job / "out/.finetune/u/result")
    assert code == 0
    newest = max(int(path.name.removeprefix("step-")) for path in (job / "out/.finetune/u/checkpoints").iterdir())
    assert f"tuned (checkpoint of step {newest})" in shown
    assert cells(shown) == expected(job)


@pytest.mark.parametrize(("owner", "words"), [("u", "tuned (published)"), ("another", "tuned (not published)")])
def test_what_is_published_is_the_jobs_where_it_is_its_own(job: Path, owner: str, words: str) -> None:
    folder = job / "out/adapter"
    folder.mkdir(exist_ok=True)
    for path in (job / "out/.finetune/u/result/adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_manifest(folder, {"job": {"uid": owner}, "files": {}})
    code, shown = asked("--job", str(job / "job.json"), "--prompt", PROMPT)
    assert code == 0
    assert words in shown
    assert cells(shown) == expected(job)


def test_an_adapter_or_a_model_of_a_folder_answers_too(job: Path, tmp_path: Path) -> None:
    result = job / "out/.finetune/u/result/adapter"
    code, shown = asked("--base", str(job / "model"), "--adapter", str(result), "--prompt", PROMPT)
    assert code == 0
    assert cells(shown) == expected(job)
    other = make_tiny_llama(tmp_path / "other", width=24, seed=4)
    code, shown = asked("--base", str(job / "model"), "--model", str(other), "--prompt", PROMPT)
    assert code == 0
    assert cells(shown) == [expected(job)[0], visible(plain(AutoModelForCausalLM.from_pretrained(other), other))]


def test_what_cannot_be_asked_is_said_in_a_line(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked("--base", str(job / "model"), "--adapter", str(tmp_path), "--prompt", PROMPT)[0] == 1
    assert f"ModelInvalid: {tmp_path} holds no adapter" in capsys.readouterr().err
    stored = json.loads((job / "job.json").read_text())
    stored["spec"]["output"]["storage"] = f"file://{tmp_path}/out"
    (tmp_path / "job.json").write_text(json.dumps(stored))
    assert asked("--job", str(tmp_path / "job.json"), "--prompt", PROMPT)[0] == 1
    assert "has nothing tuned yet" in capsys.readouterr().err


def test_pickled_weights_of_an_adapter_are_not_loaded(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_bytes((job / "out/.finetune/u/result/adapter/adapter_config.json").read_bytes())
    torch.save({}, tmp_path / "adapter_model.bin")
    assert asked("--base", str(job / "model"), "--adapter", str(tmp_path), "--prompt", PROMPT)[0] == 1
    assert "holds no adapter (adapter_model.safetensors)" in capsys.readouterr().err
