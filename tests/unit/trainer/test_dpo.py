"""Direct preference optimisation: the loss by hand and against TRL's own, whatever the layout and the split of a batch."""

import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from fsspec.implementations.local import LocalFileSystem
from tiny_models import byte_tokenizer, job_manifest, tiny_llama_config
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from finetune_api.estimate import CHUNK
from finetune_api.objectives import DpoObjective, Objective
from finetune_api.v1alpha1 import Training, parse_job
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.data.tensors import Layout, collate
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import trained_state
from finetune_trainer.model import CausalModel, head_scale
from finetune_trainer.objectives import Context, begin
from finetune_trainer.objectives.dpo import Dpo
from finetune_trainer.objectives.log_probabilities import example_log_probabilities, linear_log_probabilities
from finetune_trainer.objectives.references import FOLDER, References, references_of
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

CPU = torch.device("cpu")
Pair = tuple[list[int], list[int], list[int]]
"""Tokens of the prompt, of the chosen answer, of the rejected one."""


def pairs(count: int = 6, seed: int = 5) -> list[Pair]:
    generator = np.random.default_rng(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [int(token) for token in generator.integers(0, 250, int(generator.integers(least, most)))]

    return [(tokens(2, 9), tokens(1, 12), tokens(1, 12)) for _ in range(count)]


def examples(given: list[Pair]) -> Examples:
    parts = []
    for prompt, *answers in given:
        for answer in answers:
            parts.append((np.array(prompt + answer, np.int32), np.array([False] * len(prompt) + [True] * len(answer))))
    return join(parts, group=2)


def llama() -> PreTrainedModel:
    """With weights that are large enough for answers of very different probability."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(initializer_range=0.2))


def module_of(model: PreTrainedModel, method: dict[str, object]) -> torch.nn.Module:
    return method_for(parse_job(job_manifest(method=method), local=True).spec.method).apply(model, seed=1)


def untrained(method: dict[str, object], layout: Layout | None = None) -> CausalModel:
    model = llama()
    layout = layout or choose_layout(model)
    return CausalModel(module_of(model, method), model, layout, head_scale(model, layout), torch.float32, CPU)


def move(module: torch.nn.Module) -> None:
    """Some training, as it were: everything that trains is a little elsewhere."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)


def context(model: CausalModel, data: Examples, folder: Path, worker: Worker | None = None) -> Context:
    storage = Storage(LocalFileSystem(), str(folder), f"file://{folder}")
    prepared = Prepared(data, examples(pairs(3, seed=9)), None, 0, "sha256:1")
    return Context(model, prepared, Training(max_sequence_length=64), storage, worker or Worker())


def begun(model: CausalModel, data: Examples, folder: Path, beta: float = 0.1, smoothing: float = 0.0) -> Dpo:
    """The objective as a job begins it, with the model still as it came."""
    spec = Objective(dpo=DpoObjective(beta=beta, label_smoothing=smoothing))
    objective = begin(spec, context(model, data, folder))
    assert isinstance(objective, Dpo)
    return objective


class TrlOnOneBatch(DPOTrainer):
    """TRL's own trainer, asked for the loss of one batch."""

    def loss_of(self, given: list[Pair]) -> torch.Tensor:
        rows = [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in given]
        loss: torch.Tensor = self.compute_loss(self.model, self.data_collator(rows))
        return loss

    def metric(self, name: str) -> float:
        return self._metrics["train"][name][-1]


def trl(model: CausalModel, folder: Path, **options: Any) -> TrlOnOneBatch:
    """With the base model as the reference (as a second model, or with the adapter disabled), and the tuned weights of `model`."""
    lora = getattr(model.module, "peft_config", {}).get("default")
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "max_length": None, "activation_checkpointing": False}
    arguments = DPOConfig(output_dir=str(folder), **settings, **options)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = TrlOnOneBatch(
        model=llama(),
        ref_model=None if lora else llama(),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(lora),
    )
    trainer.model.load_state_dict(trained_state(model.module), strict=False)
    return trainer


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


METHODS: list[dict[str, object]] = [{"full": {}}, {"lora": {"rank": 4}}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: next(iter(method)))
@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_gradients_and_figures_are_trls(tmp_path: Path, method: dict[str, object], layout: Layout, beta: float) -> None:
    """The gradient of LoRA reaches the model by its hidden states alone; that of the whole model by the output layer's weights too."""
    given, data = pairs(), examples(pairs())
    model = untrained(method, "padded" if layout == "padded" else None)
    assert model.layout == layout
    objective = begun(model, data, tmp_path, beta)
    move(model.module)
    loss = objective.loss(model, collate(data, [(0, 1, 2, 3), (4, 5), (6, 7, 8, 9, 10, 11)], layout))
    (loss.total / loss.count).backward()

    theirs = trl(model, tmp_path / "trl", beta=beta)
    expected = theirs.loss_of(given)
    expected.backward()
    assert loss.count == len(given)
    torch.testing.assert_close(loss.total / loss.count, expected.detach(), atol=1e-5, rtol=0)
    assert float(loss.figures["rewardMargin"]) / len(given) == pytest.approx(theirs.metric("rewards/margins"), abs=1e-4)
    assert float(loss.figures["rewardAccuracy"]) / len(given) == pytest.approx(theirs.metric("rewards/accuracies"), abs=1e-6)
    ours, others = gradients(model.module), gradients(theirs.model)
    assert ours.keys() == others.keys()
    assert max(float(gradient.abs().max()) for gradient in others.values()) > 0.1
    for name, gradient in others.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_is_trls(tmp_path: Path, smoothing: float) -> None:
    """TRL has it in a loss that sorts a batch's rewards first, which does nothing to a batch of one pair."""
    given, data = pairs(), examples(pairs())
    model = untrained({"full": {}})
    objective = begun(model, data, tmp_path, 1.0, smoothing)
    move(model.module)
    theirs = trl(model, tmp_path / "trl", beta=1.0, loss_type="aot_unpaired", label_smoothing=smoothing)
    for index, one in enumerate(given):
        loss = objective.loss(model, collate(data, [(2 * index, 2 * index + 1)], model.layout)).total
        torch.testing.assert_close(loss, theirs.loss_of([one]), atol=1e-5, rtol=0)


def test_a_pair_by_hand(tmp_path: Path) -> None:
    """Margins of ln 3 and 0: with a smoothing of 1/4 they cost 3/4 ln(4/3) + 1/4 ln 4 and ln 2."""
    data = examples(pairs(2))
    model = untrained({"full": {}})
    with torch.no_grad():
        known = example_log_probabilities(model, collate(data, [(0, 1, 2, 3)], model.layout))
    before = known - torch.tensor([math.log(9), 0, 1, 1])
    objective = Dpo(DpoObjective(beta=0.5, label_smoothing=0.25), {"train": before})
    loss = objective.loss(model, collate(data, [(0, 1, 2, 3)], model.layout))
    assert loss.total.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4) + math.log(2), abs=1e-6)
    assert (float(loss.figures["rewardAccuracy"]), float(loss.figures["rewardMargin"])) == pytest.approx((1.5, math.log(3)), abs=1e-5)


def test_before_the_training_nothing_is_preferred(tmp_path: Path) -> None:
    data = examples(pairs())
    model = untrained({"lora": {}})
    loss = begun(model, data, tmp_path).loss(model, collate(data, [tuple(range(12))], model.layout))
    assert loss.total.item() / 6 == pytest.approx(math.log(2), abs=1e-6)
    assert float(loss.figures["rewardMargin"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, CHUNK, CHUNK + 3])
def test_chunks_are_the_plain_log_probabilities(rows: int, with_bias: bool, head_trains: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=head_trains)
    bias = torch.randn(11, generator=generator, requires_grad=head_trains) if with_bias else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    targets = torch.randint(0, 11, (rows,), generator=generator)
    scale = torch.randn(rows, generator=generator)
    plain = -functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")
    chunked = linear_log_probabilities(hidden, weight, bias, targets, torch.float32)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad((plain * scale).sum(), inputs)
    for gradient, reference in zip(torch.autograd.grad((chunked * scale).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6 * rows**0.5)


def test_without_gradients_none_are_computed() -> None:
    hidden, weight = torch.ones(16, 8), torch.ones(32, 8, requires_grad=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not linear_log_probabilities(hidden, weight, None, torch.zeros(16, dtype=torch.int64), torch.float32).requires_grad
    assert counter.get_total_flops() == 2 * 16 * 8 * 32


@pytest.mark.parametrize("method", METHODS, ids=lambda method: next(iter(method)))
def test_any_split_of_a_batch_gives_the_same_gradient(tmp_path: Path, method: dict[str, object]) -> None:
    data = examples(pairs())
    model = untrained(method)
    objective = begun(model, data, tmp_path, 1.0)
    move(model.module)
    objective.loss(model, collate(data, [tuple(range(12))], model.layout)).total.div(6).backward()
    whole = gradients(model.module)
    model.module.zero_grad()
    for rows in ([(10, 11), (0, 1, 2, 3)], [(4, 5)], [(8, 9), (6, 7)]):
        objective.loss(model, collate(data, rows, model.layout)).total.div(6).backward()
    for name, gradient in gradients(model.module).items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-4, msg=name)


def test_soft_prompts_are_measured_from_the_model_without_them(tmp_path: Path) -> None:
    data = examples(pairs())
    model = untrained({"promptTuning": {"numVirtualTokens": 3}})
    references = references_of(context(model, data, tmp_path))
    plain = references_of(context(untrained({"full": {}}), data, tmp_path / "plain"))
    for split in ("train", "validation"):
        torch.testing.assert_close(references[split], plain[split], atol=1e-5, rtol=0)
    with torch.no_grad():
        prompted = example_log_probabilities(model, collate(data, [tuple(range(12))], model.layout))
    assert (prompted - references["train"]).abs().min() > 1e-3


def plainly(data: Examples, index: int) -> float:
    """The log-probability of an example's labels by transformers and torch alone."""
    tokens, labelled = data.example(index)
    ids = torch.tensor(tokens.astype(np.int64))[None]
    with torch.no_grad():
        each = llama()(input_ids=ids).logits[0, :-1].log_softmax(dim=1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(each[torch.tensor(labelled[1:])].sum())


def test_references_that_do_not_fit_into_memory_are_computed_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = examples(pairs(6))
    plain = references_of(context(untrained({"full": {}}), data, tmp_path / "plain"))
    calls = itertools.count(1)

    def refusing(*given: Any) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return example_log_probabilities(*given)

    monkeypatch.setattr("finetune_trainer.objectives.references.example_log_probabilities", refusing)
    short = context(untrained({"full": {}}), data, tmp_path / "short")
    before = short.remedy.limit.most
    found = references_of(short)
    assert short.remedy.limit.most < before
    for split in plain:
        torch.testing.assert_close(found[split], plain[split], atol=1e-5, rtol=0)


def test_references_are_of_every_example_of_every_split(tmp_path: Path) -> None:
    data = examples(pairs())
    model = untrained({"lora": {"dropout": 0.5}})
    model.module.train()
    asked = context(model, data, tmp_path)
    references = references_of(asked)
    assert references.keys() == {"train", "validation"}
    for split, of_split in asked.data.splits().items():
        assert references[split].tolist() == pytest.approx([plainly(of_split, index) for index in range(len(of_split))], abs=1e-4)
    assert model.module.training


def test_references_are_computed_once(tmp_path: Path) -> None:
    data = examples(pairs())
    model = untrained({"full": {}})
    first = references_of(context(model, data, tmp_path))
    move(model.module)
    again = references_of(context(model, data, tmp_path))
    assert all(torch.equal(first[split], again[split]) for split in first)


@pytest.mark.parametrize("harm", ["damaged", "of other data", "without its manifest"])
def test_references_that_are_not_these_are_computed_again(tmp_path: Path, harm: str) -> None:
    data = examples(pairs())
    first = references_of(context(untrained({"full": {}}), data, tmp_path))
    if harm == "damaged":
        content = bytearray((tmp_path / FOLDER / "train.npy").read_bytes())
        content[-1] ^= 64
        (tmp_path / FOLDER / "train.npy").write_bytes(content)
    elif harm == "of other data":
        manifest = tmp_path / FOLDER / "manifest.json"
        manifest.write_text(manifest.read_text().replace("sha256:1", "sha256:2"))
    else:
        (tmp_path / FOLDER / "manifest.json").unlink()
    again = references_of(context(untrained({"full": {}}), data, tmp_path))
    torch.testing.assert_close(again["train"], first["train"], atol=1e-6, rtol=0)


def test_each_worker_computes_its_share_and_all_have_all(tmp_path: Path) -> None:
    data = examples(pairs())
    alone = references_of(context(untrained({"full": {}}), data, tmp_path / "one"))
    barrier, held = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    shares: list[int] = []

    def worker(rank: int) -> Worker:
        def all_reduce(tensor: torch.Tensor) -> None:
            held[rank] = tensor.clone()
            shares.append(int(tensor.count_nonzero()))
            barrier.wait()
            total = held[0] + held[1]
            barrier.wait()
            tensor.copy_(total)

        return Worker(rank=rank, world=2, all_reduce=all_reduce)

    def both() -> list[References]:
        with ThreadPoolExecutor(2) as pool:
            asked = [context(untrained({"full": {}}), data, tmp_path / "two", worker(rank)) for rank in range(2)]
            return [future.result() for future in [pool.submit(references_of, one) for one in asked]]

    computed = both()
    assert max(shares) < len(data)
    for found in (*computed, *both()):
        for split in ("train", "validation"):
            torch.testing.assert_close(found[split], alone[split], atol=1e-5, rtol=0)
