"""Quantized bases: refused where they cannot be; where bitsandbytes is installed, tuned for real on its CPU backend."""

import importlib.machinery
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.tiny_llama import make_tiny_llama
from tiny_models import job_manifest
from transformers import BitsAndBytesConfig
from tuned import BASE, INPUT, learn, method, trained_names

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import FineTuneJob, parse_job
from finetune_trainer import quantization
from finetune_trainer.errors import JobError
from finetune_trainer.model import load_transformer
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.quantization import check_quantization, quantization_config

CPU = torch.device("cpu")
GPU = {"resourcesPerWorker": {"nvidia.com/gpu": 1}}


def job(kind: str = "nf4", **spec: object) -> FineTuneJob:
    whole = {"model": {"source": "file:///models/tiny", "quantization": kind}, "compute": GPU} | spec
    return parse_job(job_manifest(**whole), local=True)


def installed(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    found = importlib.machinery.ModuleSpec("bitsandbytes", None) if there else None
    monkeypatch.setattr(quantization, "find_spec", lambda name: found)


def test_four_bits_are_normal_float_and_compute_in_the_jobs_format() -> None:
    config = quantization_config("nf4", torch.bfloat16)
    assert isinstance(config, BitsAndBytesConfig)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    eight = quantization_config("int8", torch.bfloat16)
    assert eight is not None
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert quantization_config("none", torch.bfloat16) is None


@pytest.mark.parametrize(
    ("gpus", "there", "message"),
    [
        (0, True, "model.quantization nf4 needs a GPU, and the workers have none"),
        (1, False, "needs bitsandbytes, which is not installed in the trainer's image"),
    ],
    ids=["no gpu", "no package"],
)
def test_what_cannot_be_is_refused_before_workers(monkeypatch: pytest.MonkeyPatch, gpus: int, there: bool, message: str) -> None:
    installed(monkeypatch, there)
    with pytest.raises(JobError, match=message) as caught:
        check_quantization(job(), gpus)
    assert caught.value.reason == Reason.INVALID_SPEC


def test_what_can_be_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, True)
    check_quantization(job(), 1)
    installed(monkeypatch, False)
    check_quantization(job("none"), 0)


needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: the extra quantization")


@pytest.mark.quantization
@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    "spec",
    [
        {"lora": {"rank": 4}},
        {"lora": {"rank": 4, "variant": "rslora"}},
        {"ia3": {}},
        {"adapter": {"placement": "houlsby", "reductionFactor": 4}},
        {"promptTuning": {"numVirtualTokens": 3}},
        {"prefixTuning": {"numVirtualTokens": 3}},
        {"pTuning": {"numVirtualTokens": 3}},
    ],
    ids=lambda spec: "-".join(str(word) for word in spec),
)
def test_every_method_tunes_a_quantized_base(tmp_path: Path, kind: str, spec: dict[str, object]) -> None:
    """The base stays as it is in its few bits, the update is float32, the published adapter loads on another quantized copy."""

    files = ModelFiles(make_tiny_llama(tmp_path / "base", width=64), BASE, "sha256:0", ("model.safetensors",))  # blocks of 64 weights

    def base() -> torch.nn.Module:
        return load_transformer(files, torch.float32, CPU, quantization_config(kind, torch.float32))

    tuning, transformer = method(**spec), base()
    layer = transformer.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    before = layer.weight.detach().clone()
    model = tuning.apply(transformer, seed=1).train()
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in trained_names(model)} == {torch.float32}
    first, last = learn(model, rate=5e-2)
    assert last < first - 0.05
    assert torch.equal(layer.weight, before)
    folder = tmp_path / "adapter"
    tuning.export(model, folder, BASE, "adapter")
    loaded = PeftModel.from_pretrained(base(), folder)
    with torch.no_grad():  # the CPU's kernels differ with and without gradients
        torch.testing.assert_close(loaded.eval()(INPUT).logits, model.eval()(INPUT).logits, rtol=0, atol=1e-5)
