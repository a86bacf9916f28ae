"""What a person gets wrong on the command line, and what each command says then: one line, the file, and what to do."""

import json
import subprocess
import sys
import urllib.error
from email.message import Message
from pathlib import Path

import pytest
from tests.unit.operator_edges.job_file import JOB
from typer.testing import CliRunner

from finetune_operator.cli import app

PROFILE = """\
apiVersion: finetune.dev/v1alpha1
kind: TuningProfile
metadata: {name: small}
spec: {limits: {gpus: 1}}
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
READERS = ("validate", "plan", "compare", "local", "chat", "measure", "submit")


def run(*arguments: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output.splitlines()


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.yaml", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("binary.yaml", "cannot be read: it is not text in UTF-8"),
        ("broken.yaml", "line 2, column 1: "),
        ("nul.yaml", "line 2: the character U+0000 may not stand in YAML; remove it"),
    ],
)
def test_every_command_tells_the_same_of_a_file_that_is_none(tmp_path: Path, command: str, name: str, words: str) -> None:
    """Exit code 2, as of wrong usage; 1 where the text was read and is refused, but for commands that could not start."""
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "nul.yaml").write_text("a: 1\nb: \0\n")
    file = tmp_path / name
    code, lines = run(command, str(file))
    assert code == (1 if name in ("broken.yaml", "nul.yaml") and command not in ("local", "chat", "measure") else 2)
    assert len(lines) == 1
    assert f"{file}: {words}" in lines[0]
    assert "Errno" not in lines[0]


@pytest.mark.parametrize("metadata", ["", "metadata: []\n", "metadata: {}\n"])
def test_a_job_without_a_name_has_nothing_to_chat_with(tmp_path: Path, metadata: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"kind: FineTuneJob\n{metadata}")
    assert run("chat", str(file)) == (2, [f"finetune: {file}: metadata.name: is required"])


@pytest.mark.parametrize("option", ["--profile", "--model-config"])
def test_an_option_that_names_no_file_is_wrong_usage_too(tmp_path: Path, option: str) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    absent = tmp_path / "absent"
    for command in ("plan", *(("validate", "local") if option == "--profile" else ())):
        code, (line,) = run(command, str(tmp_path / "job.yaml"), option, str(absent))
        assert code == 2
        assert line.removeprefix("finetune: ") == f"{absent}: cannot be read: No such file or directory"


def test_a_profile_that_is_refused_is_no_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "bad.yaml").write_text(PROFILE.replace("gpus", "gpu"))
    for command in ("plan", "validate"):
        assert run(command, str(tmp_path / "job.yaml"), "--profile", str(tmp_path / "bad.yaml"))[0] == 1


def test_profiles_are_validated_like_jobs(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(PROFILE)
    bad.write_text(PROFILE.replace("gpus", "gpu"))
    assert run("validate", str(good)) == (0, [f"{good}: accepted"])
    code, lines = run("validate", str(bad))
    assert code == 1
    assert lines[0].startswith(f"{bad}: line 4: spec.limits.gpu: unknown field; did you mean gpus?")


@pytest.mark.parametrize("command", [("list",), ("status", "bot"), ("compare", "bot")])
def test_without_a_kubeconfig_a_command_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    absent = tmp_path / "absent"
    monkeypatch.setenv("KUBECONFIG", str(absent))
    assert run(*command) == (
        1,
        [f"finetune: there is no kubeconfig {absent}: set KUBECONFIG to your cluster's (`finetune local` runs jobs without one)"],
    )


def test_no_library_warns_of_an_absent_kubeconfig(tmp_path: Path) -> None:
    """In a process of its own: the library's warning goes past what a test of the command sees."""
    code = "from finetune_operator.cli import app; app(['list'])"
    done = subprocess.run([sys.executable, "-c", code], env={"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "finetune: there is no kubeconfig ~/.kube/config: set KUBECONFIG to your cluster's (`finetune local` runs jobs without one)"
    ]


def test_a_broken_kubeconfig_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "config"
    broken.write_text("a: [1\n")
    monkeypatch.setenv("KUBECONFIG", str(broken))
    code, lines = run("list")
    assert code == 1
    assert lines[0].startswith(f"finetune: the kubeconfig {broken} cannot be used: ")


def test_a_manifest_without_a_status_is_nothing_to_compare(tmp_path: Path) -> None:
    file = tmp_path / "bot.yaml"
    file.write_text(JOB)
    assert run("compare", str(file)) == (
        1,
        [f"{file}: holds a FineTuneJob without a status; give the file NAME.status.yaml that `finetune local` wrote"],
    )


def test_a_plan_of_a_small_model_is_in_mebibytes(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    code, lines = run("plan", str(tmp_path / "job.yaml"), "--model-config", str(tmp_path))
    assert code == 0
    assert lines[0].split()[-1] == "MiB"
    # 2 embeddings of 256 x 64, and in each of 2 layers: queries and output 2 x 64 x 64, keys and values 2 x 32 x 64, 3 x 64 x 128, 2 norms;
    # one norm at the end. In bfloat16 that is 2 bytes each, in float32 4.
    parameters = 2 * 256 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    weights = next(float(line.split()[-1]) for line in lines if line.split()[0] == "weights")
    assert weights in (round(2 * parameters / 2**20, 2), round(4 * parameters / 2**20, 2))
    assert lines[-1].endswith(" MiB")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(OSError(-2, "Name or service not known")), "cannot be fetched: Name or service not known; give the model's"),
        (
            urllib.error.HTTPError("u", 401, "Unauthorized", Message(), None),
            "HTTP Error 401: Unauthorized; set HF_TOKEN where the model is",
        ),
    ],
)
def test_a_hub_that_does_not_answer_is_told_of_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def urlopen(request: object, timeout: float) -> None:
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    (tmp_path / "job.yaml").write_text(JOB)
    code, lines = run("plan", str(tmp_path / "job.yaml"))
    assert code == 1
    assert len(lines) == 1
    assert words in lines[0]
