"""What a closed loop refers to, in a local run: in lists too, and with endpoints."""

from pathlib import Path

import pytest

from finetune_operator.local.inputs import Given, InputError, missing_files, place, read_inputs, with_absolute_files
from finetune_operator.local.state import State

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: demo}
spec:
  model: {source: pvc://disk/model}
  data:
    train: {source: file://train.jsonl}
  method: {lora: {}}
  evaluation:
    suites:
      - {name: held-out, source: validation, metrics: [loss]}
      - name: judged
        configMap: {name: rows, key: judged.jsonl}
        metrics: [judgeScore]
        judge: {endpoint: {url: "https://models.example.com/v1", model: judge, secretRef: {name: judge}}}
      - {name: own, source: file://own.jsonl, metrics: [f1]}
  output: {storage: pvc://disk/out}
"""
ROWS = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: rows}\ndata: {judged.jsonl: '{}'}\n"
ENV = {"OPENAI_API_KEY": "k"}


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB + ROWS)
    return tmp_path / "job.yaml"


def test_a_judges_token_and_a_suites_rows_are_found(path) -> None:
    inputs = read_inputs(path, Given(), ENV)
    assert inputs.secrets == {"judge": {"token": b"k"}}
    assert inputs.config_maps == {"rows": {"judged.jsonl": b"{}"}}


def test_what_a_suite_lacks_is_told_with_its_line(path) -> None:
    path.write_text(JOB)
    with pytest.raises(InputError) as caught:
        read_inputs(path, Given(), {})
    config_map, secret = str(caught.value).splitlines()
    assert config_map.startswith(f"{path}: line 12: spec.evaluation.suites[1].configMap: there is no ConfigMap rows here")
    assert secret == f"{path}: there is no Secret judge here; add it to the file, or set OPENAI_API_KEY in the environment"


def test_a_suites_file_that_is_not_there_is_told_before_the_start(path) -> None:
    inputs = read_inputs(path, Given(), ENV)
    state = State(path.parent / "state")
    place(inputs, Given(), state)
    (state.claim("disk") / "model").mkdir()
    (path.parent / "train.jsonl").touch()
    (fault,) = missing_files(inputs, path, state)
    assert fault.startswith(f"{path}: spec.evaluation.suites[2].source: file://own.jsonl does not exist")


def test_relative_files_in_lists_start_from_the_manifest() -> None:
    spec = {"evaluation": {"suites": [{"source": "file://a.jsonl"}, {"source": "test"}, "file://b"]}}
    assert with_absolute_files(spec, Path("/f")) == {
        "evaluation": {"suites": [{"source": "file:///f/a.jsonl"}, {"source": "test"}, "file:///f/b"]}
    }
