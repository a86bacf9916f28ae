"""`finetune plan`, as a person calls it."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finetune_operator.cli import app

TINY = Path(__file__).parents[3] / "examples/models/tiny-llama"
JOB = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "bot"},
    "spec": {
        "model": {"source": "pvc://models/tiny"},
        "data": {"train": {"source": "pvc://data/train.jsonl"}},
        "method": {"lora": {}},
        "compute": {"resourcesPerWorker": {"nvidia.com/gpu": 1}},
        "output": {"storage": "pvc://models/out"},
    },
}


def call(folder: Path, *arguments: str, **spec: object) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**JOB, "spec": {**JOB["spec"], **spec}}))
    result = CliRunner().invoke(app, ["plan", str(file), *arguments], terminal_width=200)
    return result.exit_code, result.stdout, result.stderr


def test_memory_by_parts_and_the_verdict(tmp_path: Path) -> None:
    code, said, _ = call(tmp_path, "--model-config", str(TINY), "--gpu", "l4", "--tokens", "1000000")
    assert code == 0
    for words in ("weights", "gradients", "AdamW's moments", "activations", "logits", "in all, at its peak"):
        assert words in said
    assert "fits into l4" in said
    assert "an estimate, without waiting, measuring and publishing" in said


def test_programs_read_json_and_yaml(tmp_path: Path) -> None:
    _, as_json, _ = call(tmp_path, "--model-config", str(TINY / "config.json"), "-o", "json")
    _, as_yaml, _ = call(tmp_path, "--model-config", str(TINY / "config.json"), "-o", "yaml")
    found = json.loads(as_json)
    assert found == yaml.safe_load(as_yaml)
    assert found["memoryPerGpu"]["total"] == sum(size for name, size in found["memoryPerGpu"].items() if name != "total")
    assert "fits" not in found


def test_what_does_not_fit_ends_with_1(tmp_path: Path) -> None:
    code, said, _ = call(tmp_path, "--model-config", str(TINY), "--gpu", "h100", "--gpu-memory", "0.01")
    assert code == 1
    assert "does not fit" in said


def test_another_gpu_by_its_figures(tmp_path: Path) -> None:
    _, said, _ = call(tmp_path, "--model-config", str(TINY), "--gpu-memory", "48", "--peak-tflops", "100", "--tokens", "1000", "-o", "json")
    found = json.loads(said)
    assert found["gpuMemory"] == 48 * 2**30
    assert found["gpuHours"] == pytest.approx(found["trainingFlops"] / (100e12 * 0.4) / 3600)


def test_the_node_selector_says_which_gpu_it_is(tmp_path: Path) -> None:
    selector = {**JOB["spec"]["compute"], "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}}
    _, said, _ = call(tmp_path, "--model-config", str(TINY), "-o", "json", compute=selector)
    assert json.loads(said)["gpu"] == "l40s"


def test_a_local_model_is_read_where_it_is(tmp_path: Path) -> None:
    code, said, _ = call(tmp_path, "-o", "json", model={"source": f"file://{TINY}"})
    assert code == 0
    config = json.loads((TINY / "config.json").read_text())
    assert json.loads(said)["parameters"] > config["vocab_size"] * config["hidden_size"]


@pytest.mark.parametrize(
    ("arguments", "spec", "words"),
    [
        ([], {}, "give its config.json with --model-config, or apply the job with planOnly: true"),
        (["--gpu", "abacus"], {}, "--gpu abacus is not known; there are h200, h200-nvl, h100"),
        (["--peak-tflops", "100"], {}, "give --gpu-memory, too"),
        (["--tokens", "100"], {"training": {"packing": False}}, "give --examples, too"),
        (["--model-config", __file__], {}, "is not JSON"),
        ([], {"method": {}}, "spec.method"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, arguments: list[str], spec: dict[str, object], words: str) -> None:
    code, _, errors = call(tmp_path, *arguments, **spec)
    assert code == 1
    assert words in errors


def test_a_hub_model_s_configuration_is_fetched_with_the_user_s_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Answer:
        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, most: int) -> bytes:
            return (TINY / "config.json").read_bytes()[:most]

    def urlopen(request: object, timeout: float) -> Answer:
        asked.append((request.full_url, request.get_header("Authorization")))
        return Answer()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, _, _ = call(tmp_path, model={"source": "hf://org/model", "revision": "v1"})
    assert code == 0
    assert asked == [("https://hub.example/org/model/resolve/v1/config.json", "Bearer secret")]


PROFILE = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "TuningProfile",
    "metadata": {"name": "two-gpus"},
    "spec": {
        "compute": {"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}, "resourcesPerWorker": {"nvidia.com/gpu": 2}},
        "output": {"storage": "pvc://models/{name}"},
        "allow": {"methods": ["lora"]},
        "limits": {"workers": 1, "gpus": 2, "maxGpuHours": 1, "activeDeadlineSeconds": 600},
    },
}
UNDER = {"profileRef": {"name": "two-gpus"}, "output": {}, "compute": {}}


def under(folder: Path, *arguments: str, profile: dict[str, object] = PROFILE, **spec: object) -> tuple[int, str, str]:
    """The plan of a job that names a profile, with its file."""
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    given = ("--model-config", str(TINY), "--profile", str(folder / "profile.yaml"), *arguments)
    return call(folder, *given, **{**UNDER, **spec})


def test_the_plan_is_of_what_the_profile_gives(tmp_path: Path) -> None:
    code, said, _ = under(tmp_path, "-o", "json")
    assert code == 0
    found = json.loads(said)
    assert (found["gpu"], found["processes"]) == ("l40s", 2)
    _, own, _ = under(tmp_path, "-o", "json", compute={"resourcesPerWorker": {"nvidia.com/gpu": 1}})
    assert json.loads(own)["processes"] == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            {"compute": {"workers": {"min": 1, "max": 2}}},
            "spec.compute.workers.max is 2, and the profile two-gpus allows at most 1 (limits.workers)",
        ),
        ({"compute": {"resourcesPerWorker": {"nvidia.com/gpu": 4}}}, "the profile two-gpus allows at most 2 (limits.gpus)"),
        ({"maxGpuHours": 2}, "spec.maxGpuHours is 2, and the profile two-gpus allows at most 1 (limits.maxGpuHours)"),
        ({"method": {"full": {}}}, "spec.method is full, and the profile two-gpus allows lora (allow.methods)"),
        ({"profileRef": {"name": "other"}}, "spec.profileRef names the TuningProfile other, and --profile gives two-gpus"),
    ],
)
def test_a_job_beyond_its_profile_has_no_plan(tmp_path: Path, spec: dict[str, object], words: str) -> None:
    code, said, errors = under(tmp_path, **spec)
    assert (code, said) == (1, "")
    assert words in errors


def test_a_job_that_names_a_profile_asks_for_its_file(tmp_path: Path) -> None:
    code, _, errors = call(tmp_path, "--model-config", str(TINY), **UNDER)
    assert code == 1
    assert "spec.profileRef names the TuningProfile two-gpus: give its file with --profile" in errors


def test_a_limit_that_ends_the_training_early_is_told(tmp_path: Path) -> None:
    """The tiny model takes about 6 x its parameters for each token: at a billion operations a second that is days."""
    slow = ("--gpu", "t4", "--peak-tflops", "0.001", "--tokens", "1000000000")
    _, said, _ = under(tmp_path, *slow)
    assert "maxGpuHours (1) is less than that: the job would be suspended before it ends" in said
    assert "activeDeadlineSeconds (600) is less than that: the job would fail before it ends" in said
    _, said, _ = under(tmp_path, "--tokens", "1000")
    assert "GPU-hours of training steps" in said
    assert "less than that" not in said
