import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import job_manifest

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, ModelSource, parse_job
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import trained_state
from finetune_trainer.model import inspect_model, load_model, longest_example, precision_for
from finetune_trainer.model_files import ModelFiles, fetch_model
from finetune_trainer.sources import Mounts

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(model_folder, tmp_path / "claims" / "models" / "tiny"))


def job(**spec: object) -> FineTuneJob:
    return parse_job(job_manifest(**spec), local=True)


def fetch(tmp_path: Path, *, weights: bool = True) -> ModelFiles:
    return fetch_model(ModelSource(source="pvc://models/tiny"), Mounts(tmp_path), tmp_path / "cache", weights=weights)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_on_a_volume_is_used_where_it_is(tmp_path: Path, folder: Path) -> None:
    files = fetch(tmp_path)
    assert files.folder == folder
    assert files.weights == ("model.safetensors",)
    assert (files.base.name, files.base.revision, files.base.dtype) == ("pvc://models/tiny", None, "float32")
    assert files.revision.startswith("sha256:")


def test_the_fingerprint_tells_models_apart(tmp_path: Path, folder: Path) -> None:
    first = fetch(tmp_path).revision
    assert fetch(tmp_path).revision == first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fetch(tmp_path).revision != first
    with pytest.raises(JobError, match="have changed since the job began") as caught:
        fetch_model(ModelSource(source="pvc://models/tiny"), Mounts(tmp_path), tmp_path, weights=True, revision=first)
    assert caught.value.reason == Reason.MODEL_INVALID


def test_what_lies_below_the_folder_is_not_the_model(tmp_path: Path, folder: Path) -> None:
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"pickle")
    assert fetch(tmp_path).weights == ("model.safetensors",)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def another_format(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 this is a zip file and no safetensors")


def nested(folder: Path) -> None:
    header = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"weights")


def adapter_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (nested, Reason.MODEL_INVALID, "tiny/model.safetensors is not a safetensors file"),
        (adapter_too, Reason.MODEL_INVALID, "pvc://models/tiny holds an adapter"),
        (shutil.rmtree, Reason.MODEL_NOT_FOUND, "pvc://models/tiny does not exist"),
        (remove("config.json"), Reason.MODEL_INVALID, "has no config.json"),
        (remove("model.safetensors"), Reason.MODEL_INVALID, "has no weights"),
        (pickled, Reason.UNSAFE_MODEL_FORMAT, "has no safetensors, only pytorch_model.bin, which is never loaded"),
        (cut_off, Reason.MODEL_INVALID, "tiny/model.safetensors is damaged: "),
        (another_format, Reason.MODEL_INVALID, "tiny/model.safetensors is not a safetensors file"),
    ],
    ids=["nested header", "adapter", "missing", "no config", "no weights", "pickle", "cut off", "zip"],
)
def test_files_that_are_no_model(tmp_path: Path, folder: Path, spoil: Callable[[Path], None], reason: Reason, message: str) -> None:
    spoil(folder)
    with pytest.raises(JobError, match=message) as caught:
        fetch(tmp_path, weights=False)
    assert caught.value.reason == reason


def not_known(folder: Path) -> None:
    edit(folder / "config.json", model_type="perceptron9000")


def remote_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")


def encoder(folder: Path) -> None:
    edit(folder / "config.json", model_type="t5")


def quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def small_vocabulary(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=100)


def impossible(folder: Path) -> None:
    edit(folder / "config.json", hidden_size="wide")


def without_decoder(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama4_text", pad_token_id=0, num_local_experts=2, intermediate_size_mlp=48)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (not_known, "has no configuration that transformers knows: .*perceptron9000"),
        (remote_code, "has no configuration that transformers knows"),
        (encoder, r"\(t5\) is not a causal language model"),
        (quantised, "holds quantised weights"),
        (small_vocabulary, "the tokenizer of .* has 259 tokens, its model only 100"),
        (impossible, "has .* configuration"),
        (without_decoder, r"\(llama4_text\) cannot be computed without its output layer"),
        (no_tokenizer, "has no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "has no configuration"),
        (lambda folder: (folder / "config.json").write_text("[]"), "has no configuration"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "has no configuration"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "has no tokenizer"),
    ],
    ids=[
        *("unknown", "remote code", "encoder", "quantised", "vocabulary", "impossible", "Llama 4", "no tokenizer"),
        *("broken config", "config that is a list", "nested config", "broken tokenizer"),
    ],
)
def test_models_that_the_head_refuses(tmp_path: Path, folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(JobError, match=message) as caught:
        inspect_model(fetch(tmp_path, weights=False), job())
    assert caught.value.reason == Reason.MODEL_INVALID
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("attention", ["owner/kernel:function", "flash_attention_2"])
def test_the_attention_that_a_model_asks_for_is_not_taken(tmp_path: Path, folder: Path, attention: str) -> None:
    edit(folder / "config.json", attn_implementation=attention)
    files = fetch(tmp_path)
    inspect_model(files, job())
    assert load_model(files, job(), CPU).layout == "flat"


def test_weights_whose_shapes_are_not_their_sizes(tmp_path: Path, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(re.sub(rb'"shape":\[\d', b'"shape":[9', path.read_bytes(), count=1))
    with pytest.raises(JobError, match="pvc://models/tiny cannot be loaded") as caught:
        load_model(fetch(tmp_path), job(), CPU)
    assert caught.value.reason == Reason.MODEL_INVALID


def test_the_head_checks_the_method_too(model_files: ModelFiles) -> None:
    with pytest.raises(JobError, match="no module is called query"):
        inspect_model(model_files, job(method={"lora": {"targetModules": ["query"]}}))


def test_the_head_needs_no_weights(tmp_path: Path, folder: Path) -> None:
    files = fetch(tmp_path, weights=False)
    (folder / "model.safetensors").unlink()
    assert len(inspect_model(files, job()).tokenizer) == 259
    assert longest_example(files) == 128


def test_a_missing_weight_is_not_made_up(tmp_path: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JobError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(fetch(tmp_path), job(), CPU)


def test_a_weight_of_another_shape(tmp_path: Path, folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(JobError, match="cannot be loaded") as caught:
        load_model(fetch(tmp_path), job(), CPU)
    assert caught.value.reason == Reason.MODEL_INVALID


@pytest.mark.parametrize(
    ("method", "precision", "base", "trained", "computed"),
    [
        ("lora", "float32", torch.float32, torch.float32, torch.float32),
        ("lora", "auto", torch.float32, torch.float32, torch.float32),
        ("lora", "bfloat16", torch.bfloat16, torch.float32, torch.bfloat16),
        ("full", "bfloat16", torch.float32, torch.float32, torch.bfloat16),
    ],
)
def test_number_formats(
    model_files: ModelFiles, method: str, precision: str, base: torch.dtype, trained: torch.dtype, computed: torch.dtype
) -> None:
    model = load_model(model_files, job(method={method: {}}, training={"precision": precision}), CPU)
    assert model.transformer.get_input_embeddings().weight.dtype == base
    assert {parameter.dtype for parameter in model.trained_parameters()} == {trained}
    assert model.precision == computed
    with model.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == computed


def test_a_loaded_model_is_ready_to_train(model_files: ModelFiles) -> None:
    model = load_model(model_files, job(), CPU)
    assert model.module.training
    assert (model.layout, model.plain_head, model.device) == ("flat", True, CPU)
    assert len(model.trained_parameters()) == 28


def test_two_workers_start_alike(model_files: ModelFiles) -> None:
    states = [trained_state(load_model(model_files, job(), CPU).module) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_auto_is_float32_on_a_cpu() -> None:
    assert precision_for("auto", CPU) == torch.float32
    assert precision_for("bfloat16", CPU) == torch.bfloat16
