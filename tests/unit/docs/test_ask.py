"""examples/ask.py asks a model of every kind that is published, with nothing of this project imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from tests.unit.docs.markdown import ROOT
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel

BASE = ROOT / "examples/models/tiny-llama"


def published(folder: Path, kind: str, **spec: object) -> None:
    """A folder as a job leaves it, of a method whose trained parameters are all zero."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(BASE)
    method = method_for(MethodSpec.model_validate_json(json.dumps(spec)))
    tuned = method.apply(model, seed=1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    folder.mkdir()
    method.export(tuned, folder, BaseModel(str(BASE), None, "float32"), kind)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / file, folder / file)


def asked(folder: Path, option: str) -> tuple[str, str]:
    """The answers before and after."""
    command = [sys.executable, str(ROOT / "examples/ask.py"), "--base", str(BASE), f"--{option}", str(folder), "--tokens", "4", "E07?"]
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    row = next(line for line in done.stdout.splitlines() if "E07?" in line)
    _, _, before, after, _ = (cell.strip() for cell in row.split("│"))
    return before, after


def test_a_bottleneck_adapter_is_loaded_with_the_file_that_peft_lacks(tmp_path: Path) -> None:
    """One of zeros changes nothing."""
    published(tmp_path / "out", "adapter", adapter={})
    before, after = asked(tmp_path / "out", "adapter")
    assert before == after != ""


def test_a_whole_model_answers_by_itself(tmp_path: Path) -> None:
    published(tmp_path / "out", "model", full={})
    before, after = asked(tmp_path / "out", "model")
    assert before != after
