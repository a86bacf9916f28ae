"""The committed CRD, the chart's copy and the reference follow from the models; `make generate` writes them."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

from finetune_api.crd import custom_resource_definition
from finetune_api.profile_crd import profile_definition
from finetune_api.reasons import ADVICE, MEANINGS, Reason

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def generate():
    """crds/generate.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "crds/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_files_are_fresh(generate):
    names = [str(path.relative_to(ROOT)) for path in generate.outputs()]
    assert names == [
        "crds/finetunejobs.yaml",
        "crds/tuningprofiles.yaml",
        "charts/finetune-operator/templates/crd.yaml",
        "charts/finetune-operator/templates/crd-tuningprofiles.yaml",
        "docs/reference.md",
        "docs/reasons.md",
    ]
    assert generate.stale(generate.outputs()) == [], "run `make generate` and commit the result"


DEFINITIONS = [("finetunejobs", "crd", custom_resource_definition()), ("tuningprofiles", "crd-tuningprofiles", profile_definition())]


@pytest.mark.parametrize(("file", "_template", "definition"), DEFINITIONS)
def test_the_file_holds_the_definition(file, _template, definition):
    assert yaml.safe_load((ROOT / f"crds/{file}.yaml").read_text(encoding="utf-8")) == definition


@pytest.mark.parametrize(("_file", "template", "definition"), DEFINITIONS)
def test_the_charts_copy_differs_by_its_switches_alone(_file, template, definition):
    lines = (ROOT / f"charts/finetune-operator/templates/{template}.yaml").read_text(encoding="utf-8").splitlines()
    switches = [line.strip() for line in lines if "{{" in line]
    assert switches[1:] == ["{{- if .Values.crds.enabled }}", "{{- if .Values.crds.keep }}", "{{- end }}", "{{- end }}"]
    copy = yaml.safe_load("\n".join(line for line in lines if "{{" not in line))
    assert copy["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert copy == definition


def test_check_names_a_stale_file_and_fails(generate, monkeypatch, tmp_path, capsys):
    stale = tmp_path / "crd.yaml"
    stale.write_text("old")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "outputs", lambda: {stale: "new"})
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert stale.read_text() == "old"
    assert "stale: crd.yaml" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert stale.read_text() == "new"


def test_a_description_that_helm_would_read_as_a_template_is_refused(generate):
    definition = custom_resource_definition()
    definition["spec"]["names"]["kind"] = "{{ .Values.kind }}"
    with pytest.raises(ValueError, match="Helm"):
        generate.chart_template(definition)


def test_the_reference_names_every_field_and_every_reason():
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert "| `learningRate` | number | `0.0002` | > 0, ≤ 1 | Peak learning rate of AdamW. |" in text
    assert "### spec.compute.tolerations[]" in text
    assert "### spec.search.parameters.*" in text
    assert "`method.lora.rank`, " in text.split("### Fields that spec.search can try")[1].split("## status")[0]
    rows = re.findall(r"^\| `(\w+)` \| (yes|no|-) \| (.+) \|$", text.split("## Reasons")[1], re.MULTILINE)
    assert sorted(reason for reason, _, _ in rows) == sorted(Reason)
    for reason, retried, words in rows:
        advice = ADVICE.get(Reason(reason))
        assert (retried, words) == ("-", MEANINGS[Reason(reason)]) if advice is None else (("no", "yes")[advice.retryable], advice.hint)
