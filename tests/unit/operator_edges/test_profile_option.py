"""`--profile FILE`: what `finetune validate` and `finetune local` make of a profile without a cluster."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from finetune_operator.cli import app
from finetune_operator.local.inputs import Given, InputError, read_inputs

PROFILE = """\
apiVersion: finetune.dev/v1alpha1
kind: TuningProfile
metadata: {name: small}
spec:
  output: {storage: "pvc://models/{namespace}/{name}"}
  allow: {models: ["hf://Qwen/", "pvc://base"], methods: [lora], queues: [low], tolerations: []}
  limits: {activeDeadlineSeconds: 3600}
  queue: gpu
"""
JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: bot, namespace: team-a}
spec:
  model: {source: hf://Qwen/Qwen3-0.6B}
  data: {train: {source: pvc://data/train.jsonl}}
  method: {lora: {}}
  profileRef: {name: small}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


def validate(folder: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["validate", str(folder / "job.yaml"), *more])
    return result.exit_code, result.output


def test_validate_takes_a_job_within_its_profile(folder: Path) -> None:
    assert validate(folder, "--profile", str(folder / "profile.yaml"))[0] == 0
    assert validate(folder)[0] == 0  # as the API server would, which asks no profile


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hf://Qwen/Qwen3-0.6B", "hf://Qwen-evil/model", "spec.model names hf://Qwen-evil/model, which the profile small does not allow"),
        ("lora: {}", "full: {}", "spec.method is full, and the profile small allows lora (allow.methods)"),
        (
            "namespace: team-a}",
            "namespace: team-a, labels: {kueue.x-k8s.io/queue-name: prod}}",
            "metadata.labels has kueue.x-k8s.io/queue-name=prod, and the profile small allows gpu, low (queue, allow.queues)",
        ),
        (
            "  profileRef",
            "  compute: {tolerations: [{operator: Exists}]}\n  profileRef",
            "spec.compute.tolerations[0] is {operator: Exists}, which the profile small does not allow (allow.tolerations)",
        ),
        ("name: small", "name: large", "spec.profileRef names the TuningProfile large, and --profile gives small"),
    ],
)
def test_validate_names_what_goes_beyond_the_profile(folder: Path, old: str, new: str, words: str) -> None:
    (folder / "job.yaml").write_text(JOB.replace(old, new))
    code, output = validate(folder, "--profile", str(folder / "profile.yaml"))
    assert code == 1
    assert words in output.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (JOB, "holds 0 objects of kind TuningProfile"),
        (PROFILE + "---\n" + PROFILE, "holds 2 objects"),
        (PROFILE.replace("limits", "limit"), "line 7: spec.limit: unknown field; did you mean limits?"),
        ("a: [", "line"),
    ],
)
def test_a_file_that_is_no_profile_is_told_of(folder: Path, text: str, words: str) -> None:
    (folder / "profile.yaml").write_text(text)
    code, output = validate(folder, "--profile", str(folder / "profile.yaml"))
    assert code == 1
    assert words in output


def test_a_local_run_is_given_what_the_profile_gives(folder: Path) -> None:
    spec = read_inputs(folder / "job.yaml", Given(profile=folder / "profile.yaml"), {}).job.spec
    assert spec.output.storage == "pvc://models/team-a/bot"
    assert spec.active_deadline_seconds == 3600
    assert spec.profile_ref is None


def test_a_local_run_of_a_job_that_names_a_profile_asks_for_its_file(folder: Path) -> None:
    with pytest.raises(InputError, match=r"spec.profileRef names the TuningProfile small: give its file with --profile"):
        read_inputs(folder / "job.yaml", Given(), {})


def test_a_local_run_is_refused_what_the_profile_refuses(folder: Path) -> None:
    (folder / "job.yaml").write_text(JOB.replace("hf://Qwen/Qwen3-0.6B", "file:///models/own"))
    with pytest.raises(InputError, match=r"job.yaml: spec.model names file:///models/own, which the profile small does not allow"):
        read_inputs(folder / "job.yaml", Given(profile=folder / "profile.yaml"), {})


def test_code_of_a_model_needs_consent_here_too(folder: Path) -> None:
    plain = JOB.replace("  profileRef: {name: small}\n", "  output: {storage: pvc://models/bot}\n")
    (folder / "job.yaml").write_text(plain.replace("Qwen3-0.6B}", "Qwen3-0.6B, trustRemoteCode: true}"))
    with pytest.raises(InputError, match="needs a TuningProfile that says allowRemoteCode"):
        read_inputs(folder / "job.yaml", Given(), {})
    (folder / "profile.yaml").write_text(PROFILE + "  allowRemoteCode: true\n")
    assert read_inputs(folder / "job.yaml", Given(profile=folder / "profile.yaml"), {}).job.spec.model.trust_remote_code
