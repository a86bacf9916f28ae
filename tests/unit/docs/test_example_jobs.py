"""No example runs nowhere: each is a job that the tests run, or one that needs a GPU or a hub and is named here."""

from typing import Any

import pytest
from tests.builders import raw_job
from tests.example_jobs import JOBS, LEFT_OUT, RUNNABLE, shown, taught_by, why_not_here
from tests.unit.docs.markdown import EXAMPLES, ROOT

from finetune_api.v1alpha1 import parse_job


def test_what_is_left_out_is_known_by_name() -> None:
    assert {shown(path): why for path, why in LEFT_OUT.items()} == {
        "examples/full-llama-3.2-1b-gpu.yaml": "asks for a GPU",
        "examples/full-qwen2.5-7b-gpus.yaml": "asks for a GPU",
        "examples/lora-qwen2.5-7b-gpu.yaml": "asks for a GPU",
        "examples/qlora-qwen2.5-14b-gpu.yaml": "asks for a GPU",
        "examples/minimal.yaml": "needs hf://Qwen/Qwen2.5-0.5B-Instruct",
        "examples/platform/job.yaml": "needs hf://Qwen/Qwen3-8B",
    }


def test_all_others_run() -> None:
    others = {shown(path) for path in EXAMPLES if path not in JOBS}
    assert others == {"examples/quickstart-storage.yaml", "examples/platform/profile.yaml"}
    assert {"methods", "objectives", "examples"} == {path.parent.name for path in RUNNABLE}
    assert {path.name for path in RUNNABLE if path.parent.name == "examples"} == {"quickstart.yaml", "closed-loop.yaml"}


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"model": {"source": "pvc://base/tiny"}}, ""),
        ({"model": {"source": "hf://org/model"}}, "needs hf://org/model"),
        ({"model": {"source": "pvc://base/tiny"}, "output": {"storage": "s3://bucket/out"}}, "needs s3://bucket/out"),
        ({"model": {"source": "hf://org/model"}, "compute": {"resourcesPerWorker": {"amd.com/gpu": 1}}}, "asks for a GPU"),
        ({"model": {"source": "pvc://base/tiny"}, "compute": {"resourcesPerWorker": {"cpu": 4}}}, ""),
    ],
)
def test_only_a_gpu_and_what_is_far_away_excuse_an_example(spec: dict[str, Any], why: str) -> None:
    defaults = {"data": {"train": {"source": "pvc://data/train.jsonl"}}, "output": {"storage": "pvc://models/out"}}
    assert why_not_here(parse_job(raw_job(**{**defaults, **spec})).spec) == why


def test_an_example_comes_after_the_one_that_publishes_its_teacher() -> None:
    objectives = ROOT / "examples/objectives"
    assert taught_by(objectives / "distillation-relation.yaml") == (ROOT / "examples/methods/lora.yaml",)
    assert taught_by(objectives / "distillation-endpoint.yaml") == ()
    assert taught_by(objectives / "dpo.yaml") == ()
