"""The manifest and what it refers to: taken, or refused with file, line and field."""

from pathlib import Path

import pytest

from finetune_operator.local.inputs import Given, InputError, local_path, missing_files, place, read_inputs, with_absolute_files
from finetune_operator.local.state import State

JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: demo}
spec:
  model: {source: pvc://disk/model}
  data:
    train: {configMap: {name: rows, key: train.jsonl}}
  method: {lora: {}}
  output: {storage: pvc://disk/out}
"""
ROWS = """\
---
apiVersion: v1
kind: ConfigMap
metadata: {name: rows}
data: {train.jsonl: "one\\n"}
binaryData: {more.parquet: AAE=}
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def written(folder, text):
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refusal(folder, text, given=None, env=None):
    path = written(folder, text)
    with pytest.raises(InputError) as caught:
        read_inputs(path, given or Given(), env or {})
    return str(caught.value).replace(str(path), "job.yaml")


def test_a_job_and_its_config_map_stand_in_one_file(folder):
    inputs = read_inputs(written(folder, JOB + ROWS), Given(), {})
    assert inputs.job.metadata.name == "demo"
    assert inputs.config_maps == {"rows": {"train.jsonl": b"one\n", "more.parquet": b"\x00\x01"}}
    assert inputs.notes == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("method: {lora: {}}", "method: {lora: {rank: 0}}"), "job.yaml: line 8: spec.method.lora.rank: must be "),
        (("kind: FineTuneJob", "kind: FinetuneJob"), "job.yaml: holds 0 objects of kind FineTuneJob; a local run takes exactly one"),
        (("name: demo}", "name: Demo}"), "job.yaml: line 3: metadata.name: "),
        (("name: demo}", "name: ../../demo}"), "job.yaml: line 3: metadata.name: "),
        (("pvc://disk/model", "pvc://disk/../model"), "job.yaml: line 5: spec.model.source: "),
        (
            ("key: train.jsonl", "key: test.jsonl"),
            "job.yaml: line 7: spec.data.train.configMap: the ConfigMap rows has no key test.jsonl; its keys: ",
        ),
        (("name: rows, key", "name: other, key"), "job.yaml: line 7: spec.data.train.configMap: there is no ConfigMap other here; "),
        (("metadata: {name: rows}", "metadata: {name: ../rows}"), "job.yaml: line 12: ConfigMap: metadata.name must be a name"),
        (('train.jsonl: "one', '"../../x": "one'), "job.yaml: line 12: ConfigMap rows: '../../x' cannot be a key"),
        (("AAE=", "AAE"), "job.yaml: line 12: ConfigMap rows: data cannot be read: "),
        (("spec:", "spec: ]"), "job.yaml: line "),
    ],
)
def test_a_fault_is_told_with_file_line_and_field(folder, change, expected):
    text = JOB + ROWS
    assert change[0] in text
    assert refusal(folder, text.replace(*change)).startswith(expected)


def test_a_file_must_be_there_and_be_text(folder):
    with pytest.raises(InputError, match="No such file"):
        read_inputs(folder / "absent.yaml", Given(), {})
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_inputs(folder / "binary.yaml", Given(), {})


def test_a_folder_becomes_a_config_map_as_with_kubectl(folder):
    rows = folder / "rows"
    (rows / "below").mkdir(parents=True)
    (rows / "train.jsonl").write_text("x")
    (rows / "a b").write_text("no key can be called so")
    inputs = read_inputs(written(folder, JOB), Given(config_maps={"rows": rows}), {})
    assert inputs.config_maps == {"rows": {"train.jsonl": b"x"}}


def test_a_config_map_option_names_what_is_wrong(folder):
    assert "--config-map rows=" in refusal(folder, JOB, Given(config_maps={"rows": folder / "absent"}))
    assert "cannot be the name of a ConfigMap" in refusal(folder, JOB, Given(config_maps={"../x": folder}))


SECRET = JOB.replace("{source: pvc://disk/model}", "{source: hf://a/b, secretRef: {name: hub}}")


def test_a_secret_comes_from_the_file_or_the_environment(folder):
    assert read_inputs(written(folder, SECRET + ROWS), Given(), {"HF_TOKEN": "t"}).secrets == {"hub": {"token": b"t"}}
    document = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: hub}\nstringData: {token: s}\ndata: {other: dg==}\n"
    assert read_inputs(written(folder, SECRET + ROWS + document), Given(), {"HF_TOKEN": "t"}).secrets == {
        "hub": {"token": b"s", "other": b"v"}
    }
    assert "there is no Secret hub here; add it to the file, or set HF_TOKEN" in refusal(folder, SECRET + ROWS)


def test_keys_of_a_bucket_come_from_the_variables_that_aws_uses(folder):
    text = JOB.replace("{storage: pvc://disk/out}", "{storage: s3://bucket/out, secretRef: {name: s3}}") + ROWS
    env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "c"}
    assert read_inputs(written(folder, text), Given(), env).secrets == {
        "s3": {"accessKeyId": b"a", "secretAccessKey": b"b", "region": b"c"}
    }


def taught_by(teacher):
    return JOB.replace("  output:", f"  objective: {{distillation: {{teacher: {teacher}, response: {{}}}}}}\n  output:") + ROWS


def test_a_teachers_secrets_come_from_the_variables_that_its_clients_use(folder):
    served = taught_by('{endpoint: {url: "https://models.example.com/v1", model: large, secretRef: {name: served}}}')
    assert read_inputs(written(folder, served), Given(), {"OPENAI_API_KEY": "k", "HF_TOKEN": "t"}).secrets == {"served": {"token": b"k"}}
    (note,) = read_inputs(written(folder, served), Given(), {"OPENAI_API_KEY": "k"}).notes
    assert note.endswith("teacher.endpoint: a key of your environment is sent to https://models.example.com/v1, as the Secret served")
    assert "there is no Secret served here; add it to the file, or set OPENAI_API_KEY" in refusal(folder, served)
    loaded = taught_by("{source: hf://a/large, secretRef: {name: hub}}")
    assert read_inputs(written(folder, loaded), Given(), {"HF_TOKEN": "t"}).secrets == {"hub": {"token": b"t"}}


def test_what_means_nothing_here_is_told_or_passed_over(folder):
    text = JOB + ROWS + "---\nkind: PersistentVolumeClaim\nmetadata: {name: disk}\n---\nkind: Service\nmetadata: {name: s}\n"
    (note,) = read_inputs(written(folder, text), Given(), {}).notes
    assert note.endswith("kind Service means nothing in a local run")


@pytest.fixture
def state(folder):
    state = State(folder / "state")
    state.prepare()
    return state


def test_config_maps_and_secrets_become_files_for_this_user_alone(folder, state):
    inputs = read_inputs(written(folder, SECRET + ROWS), Given(), {"HF_TOKEN": "t"})
    place(inputs, Given(), state)
    token = state.secret("hub") / "token"
    assert token.read_text() == "t"
    assert token.stat().st_mode & 0o777 == 0o600
    assert (state.root / "secrets").stat().st_mode & 0o777 == 0o700
    assert (state.config_map("rows") / "train.jsonl").read_bytes() == b"one\n"


def test_a_key_that_is_no_longer_given_goes(folder, state):
    place(read_inputs(written(folder, JOB + ROWS), Given(), {}), Given(), state)
    place(read_inputs(written(folder, JOB + ROWS.replace("binaryData: {more.parquet: AAE=}\n", "")), Given(), {}), Given(), state)
    assert [path.name for path in state.config_map("rows").iterdir()] == ["train.jsonl"]


def test_a_claim_is_a_folder_of_ones_own_or_an_empty_one(folder, state):
    inputs = read_inputs(written(folder, JOB + ROWS), Given(), {})
    place(inputs, Given(), state)
    assert state.claim("disk").is_dir()
    own = folder / "own"
    own.mkdir()
    with pytest.raises(InputError, match="holds files of earlier runs"):
        place(inputs, Given(claims={"disk": own}), state)
    state.claim("disk").rmdir()
    place(inputs, Given(claims={"disk": own}), state)
    assert state.claim("disk").resolve() == own.resolve()


def test_files_put_into_a_claim_stay_inside_it(folder, state):
    """The trainer follows no link out of a claim, so the files themselves must be there."""
    model = folder / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "weights").write_text("w")
    inputs = read_inputs(written(folder, JOB + ROWS), Given(), {})
    for _ in range(2):
        place(inputs, Given(claims={"disk/model": model}), state)
    there = state.claim("disk") / "model" / "sub" / "weights"
    assert there.read_text() == "w"
    assert there.resolve().is_relative_to(state.claim("disk").resolve())
    assert [path.name for path in there.parent.iterdir()] == ["weights"]


@pytest.mark.parametrize("target", ["../disk", "disk/../../x", "disk//etc", "Disk", ""])
def test_a_claim_option_cannot_lead_out_of_the_state(folder, state, target):
    inputs = read_inputs(written(folder, JOB + ROWS), Given(), {})
    with pytest.raises(InputError, match="is not NAME or NAME/PATH"):
        place(inputs, Given(claims={target: folder}), state)


def test_a_source_that_is_not_there_is_told_before_the_start(folder, state):
    path = written(folder, JOB + ROWS)
    inputs = read_inputs(path, Given(), {})
    place(inputs, Given(), state)
    (fault,) = missing_files(inputs, path, state)
    assert fault.startswith(f"{path}: spec.model.source: pvc://disk/model does not exist")
    assert "--claim disk/model=" in fault
    (state.claim("disk") / "model").mkdir()
    assert missing_files(inputs, path, state) == []


def test_a_teacher_that_is_not_there_is_told_before_the_start(folder, state):
    path = written(folder, taught_by("{source: pvc://teachers/large}"))
    inputs = read_inputs(path, Given(), {})
    place(inputs, Given(), state)
    (state.claim("disk") / "model").mkdir()
    (fault,) = missing_files(inputs, path, state)
    assert fault.startswith(f"{path}: spec.objective.distillation.teacher.source: pvc://teachers/large does not exist")


def test_uris_lead_to_this_machine():
    state, folder = State(Path("/s")), Path("/f")
    assert local_path("pvc://c/a/b", state, folder) == Path("/s/claims/c/a/b")
    assert local_path("file://./a", state, folder) == Path("/f/a")
    assert local_path("file:///a", state, folder) == Path("/a")
    assert local_path("hf://a/b", state, folder) is None


def test_relative_files_start_from_the_manifest():
    spec = {"model": {"source": "file://models/m"}, "data": {"train": {"source": "file:///abs"}}, "n": 1}
    assert with_absolute_files(spec, Path("/f")) == {
        "model": {"source": "file:///f/models/m"},
        "data": {"train": {"source": "file:///abs"}},
        "n": 1,
    }
