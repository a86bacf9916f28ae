"""YAML as kubectl reads it. The expected values were printed by `kubectl create --dry-run=client -o json` (kubectl 1.32)."""

import json

import pytest
from pydantic import ValidationError

from finetune_api.v1alpha1 import parse_job
from finetune_operator.manifest import MAX_VALUES, ManifestError, explain, fields_at, read_manifests

AS_KUBECTL = [
    ("2e-4", 0.0002),
    ("2E+3", 2000),
    ("1.0", 1),
    ("1e3", 1000),
    ("1e21", 1e21),
    (".5", 0.5),
    ("5.", 5),
    ("+5", 5),
    ("-0", 0),
    ("08", 8),
    ("0777", 511),
    ("0o17", 15),
    ("0x1F", 31),
    ("0b11", 3),
    ("1_000", 1000),
    ("123456789012345678901234", 123456789012345678901234),
    ("1:30", "1:30"),
    ("2020-01-01", "2020-01-01"),
    ("=", "="),
    ("y", True),
    ("yes", True),
    ("on", True),
    ("n", False),
    ("Off", False),
    ("~", None),
    ("", None),
    ("'2e-4'", "2e-4"),
    ('"yes"', "yes"),
    ("!!str 5", "5"),
]


@pytest.mark.parametrize(("written", "value"), AS_KUBECTL)
def test_scalars_are_what_kubectl_makes_of_them(written, value):
    (manifest,) = read_manifests(f"a: {written}\n")
    # JSON tells true from 1 and 5 from 5.0, which Python's equality does not.
    assert json.dumps(manifest["a"]) == json.dumps(value)


@pytest.mark.parametrize(("written", "key"), [("1", "1"), ("1.5", "1.5"), ("true", "true"), ("n", "false"), ("'n'", "n"), ("2e1", "20")])
def test_keys_are_strings(written, key):
    assert read_manifests(f"{written}: a\n") == [{key: "a"}]


def test_several_documents_and_empty_ones():
    text = "---\n# nothing but words\n---\na: 1\n---\n\n---\nb: [1, {c: 2}]\n"
    assert read_manifests(text) == [{"a": 1}, {"b": [1, {"c": 2}]}]
    assert read_manifests("") == []


def test_aliases_and_merge_keys():
    text = "base: &base {a: 1, b: 2}\nmerged: {<<: *base, b: 3}\nboth: {<<: [{a: 9}, *base]}\nsame: *base\n"
    assert read_manifests(text) == [
        {"base": {"a": 1, "b": 2}, "merged": {"a": 1, "b": 3}, "both": {"a": 9, "b": 2}, "same": {"a": 1, "b": 2}}
    ]


REFUSED = [
    ("a: 1\nb: 2\na: 3\n", "line 3: a stands twice; keep one"),
    ("a:\n  b: [{c: 1, c: 2}]\n", "line 2: a.b[0].c stands twice; keep one"),
    ("on: 1\n'true': 2\n", "line 2: true stands twice; keep one"),
    ("a:\n\tb: 1\n", "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
    ("a: b: c\n", "line 1, column 5: mapping values are not allowed here; check the indentation, and quote values that contain ': '"),
    ("- a\n", "line 1: a manifest is a mapping (apiVersion, kind, metadata, spec), not a list"),
    ("all: &all [*all]\n", "line 1: an alias must not contain itself"),
    ("a: .nan\n", ".nan is not a number that JSON can hold"),
    ("a: 1e400\n", "1e400 is not a number that JSON can hold"),
    ("a: !!binary aGk=\n", "has no meaning in a manifest; remove the tag or quote the value"),
    ("a: !!int five\n", "has no meaning in a manifest"),
    ("a: !!python/object/apply:os.system [id]\n", "has no meaning in a manifest"),
    ("{a: b}: c\n", "line 1: a key must be a word"),
    ("~: c\n", "line 1: a key must be a word"),
    ("a: *nowhere\n", "line 1, column 4: found undefined alias 'nowhere'"),
    ("b: {<<: 1}\n", "<< takes a mapping, or a list of mappings"),
    ("a: \x00\n", "line 1: the character U+0000 may not stand in YAML"),
    ("[" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_is_no_manifest_is_refused_with_its_line(text, words):
    with pytest.raises(ManifestError) as refused:
        read_manifests(text)
    assert words in str(refused.value)


def test_a_few_lines_cannot_stand_for_millions_of_values():
    levels = "\n".join(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]" for level in range(1, 8))
    with pytest.raises(ManifestError, match=f"more than {MAX_VALUES} values"):
        read_manifests(f"l0: &l0 [x, x]\n{levels}\n")


JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: a}
spec:
  model:
    source: hf://Qwen/Qwen2.5-0.5B
  data: {train: {source: pvc://a/b.jsonl}}
  method: {lora: }
  output: {artifacts: adapter}
  trainig: {epochs: 3}
  training:
    epochs: "5"
    microBatchSize: many
  compute:
    tolerations:
      - {key: a, operator: Exists}
      - {key: b, effect: NoStart}
    resourcesPerWorker:
      memory: 64 Gi
"""


def test_every_fault_is_explained_with_its_line_and_remedy():
    (manifest,) = read_manifests(JOB)
    with pytest.raises(ValidationError) as refused:
        parse_job(manifest)
    assert sorted(explain(refused.value, manifest), key=lambda line: int(line.split()[1].rstrip(":"))) == [
        "line 8: spec.method: exactly one of full, freeze, lora, adapter, ia3, promptTuning, prefixTuning, pTuning must be set; "
        "lora has no value here: write `lora: {}` for its defaults",
        "line 9: spec.output.artifacts: must be a list, not 'adapter'",
        "line 10: spec.trainig: unknown field; did you mean training?",
        "line 12: spec.training.epochs: must be an integer, not '5'; remove the quotes",
        "line 13: spec.training.microBatchSize: must be an integer from 1 to 4096, or auto, not 'many'",
        "line 17: spec.compute.tolerations[1].effect: must be one of 'NoSchedule', 'PreferNoSchedule' or 'NoExecute', not 'NoStart'",
        "line 19: spec.compute.resourcesPerWorker.memory: "
        "must be a quantity: a whole number, or a string such as 500m, '1.5' or 64Gi, not '64 Gi'",
    ]


def test_without_the_manifest_the_explanation_has_no_lines():
    with pytest.raises(ValidationError) as refused:
        parse_job({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "a"}})
    assert explain(refused.value) == ["spec: is required"]


def test_fields_at_follows_the_models():
    assert fields_at(("spec", "method")) == ("full", "freeze", "lora", "adapter", "ia3", "promptTuning", "prefixTuning", "pTuning")
    assert fields_at(("spec", "compute", "tolerations", 3))[0] == "key"
    assert fields_at(("spec", "data", "validation", "configMap")) == ("name", "key")
    assert fields_at(("spec", "suspend")) == ()
    assert fields_at(("spec", "nowhere", "deeper")) == ()
