"""The whole objective on small models: against dense formulas, over any split of a batch, in either layout."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from finetune_api.v1alpha1 import DistillationObjective, Training
from finetune_trainer.attention import choose_layout
from finetune_trainer.data.batches import rank_share
from finetune_trainer.data.examples import Examples, Prepared, join
from finetune_trainer.data.tensors import Layout, collate
from finetune_trainer.model import CausalModel, head_scale
from finetune_trainer.objectives import Context, Sft, parameters_of
from finetune_trainer.objectives.distillation import begin_distillation
from finetune_trainer.objectives.distillation.relation import Relations
from finetune_trainer.storage import Storage
from finetune_trainer.worker import Worker

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
CPU = torch.device("cpu")
SOURCE = {"teacher": {"source": "pvc://models/teacher"}}
ROWS = ((0, 1), (2,), (3, 4))


def llama(seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"initializer_range": 0.3} | changes)))


def causal(model: PreTrainedModel, layout: Layout | None = None, *, teaches: bool = False) -> CausalModel:
    chosen = layout or choose_layout(model)
    scale = head_scale(model, chosen)
    if teaches:
        model.requires_grad_(False)
    return CausalModel(model, model, chosen, scale, torch.float32, CPU)


@pytest.fixture(scope="module")
def data() -> Examples:
    generator = np.random.default_rng(3)
    return join([(generator.integers(0, 50, n).astype(np.int32), generator.random(n) < 0.6) for n in (9, 4, 14, 6, 7)])


def begin(data: Examples, student: CausalModel, taught_by: CausalModel | None, **forms: Any) -> Any:
    spec = DistillationObjective.model_validate_json(json.dumps(SOURCE | forms))
    prepared = Prepared(data, data, None, 0, "sha256:1")
    return begin_distillation(spec, Context(student, prepared, Training(seed=5), storage_in(Path("/nowhere")), Worker(), taught_by))


def storage_in(folder: Path) -> Storage:
    return Storage(LocalFileSystem(), str(folder), f"file://{folder}")


def each_example(
    data: Examples, student: PreTrainedModel, teacher: PreTrainedModel
) -> Iterator[tuple[Any, Any, torch.Tensor, torch.Tensor]]:
    """Both models' outputs of each example by itself, by transformers alone, with the label positions and the labels."""
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    for index in range(len(data)):
        tokens, labelled = (torch.tensor(np.array(part)) for part in data.example(index))
        places = labelled[1:].nonzero()[:, 0]
        arguments = {"input_ids": tokens.long()[None], "use_cache": False, "output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            taught = teacher(**arguments)
        yield student(**arguments), taught, places, tokens.long()[1:][places]


def check(objective: Any, student: CausalModel, data: Examples, expected: torch.Tensor) -> None:
    """Loss and gradients are the expected ones."""
    parameters = student.trained_parameters() + [parameter for _, parameter in parameters_of(objective)]
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    loss = objective.loss(student, collate(data, ROWS, student.layout))
    assert loss.count == int(data.label_counts().sum())
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(torch.autograd.grad(loss.total, parameters, allow_unused=True), gradients, strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_response_with_labels(data: Examples, layout: Layout) -> None:
    student, teacher = llama(1), llama(2, num_hidden_layers=3, hidden_size=48)
    expected = torch.zeros(())
    for ours, theirs, places, labels in each_example(data, student, teacher):
        mine, its = ours.logits[0, places], theirs.logits[0, places]
        expected = expected + 0.3 * functional.cross_entropy(mine, labels, reduction="sum")
        kl = functional.kl_div((mine / 2).log_softmax(-1), (its / 2).log_softmax(-1), log_target=True, reduction="sum")
        expected = expected + 0.8 * 4 * kl
    forced = None if layout == "flat" else layout
    wrapped = causal(student.train(), forced), causal(teacher, forced, teaches=True)
    assert {each.layout for each in wrapped} == {layout}
    objective = begin(data, *wrapped, labelWeight=0.3, response={"weight": 0.8, "temperature": 2})
    check(objective, wrapped[0], data, expected)
    assert type(objective.measured) is Sft
    assert parameters_of(objective) == []


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_head_that_is_more_than_a_linear_layer(data: Examples, name: str) -> None:
    """Gemma 2 caps its logits, Granite divides them."""
    torch.manual_seed(3)
    capped = SIZES | {"head_dim": 8, "final_logit_softcapping": 0.5, "initializer_range": 0.3}
    scaled = SIZES | {"logits_scaling": 3.0, "initializer_range": 0.3}
    student, teacher = (
        Gemma2ForCausalLM(Gemma2Config(**capped)) if name == "gemma2" else GraniteForCausalLM(GraniteConfig(**scaled)) for _ in range(2)
    )
    expected = torch.zeros(())
    for ours, theirs, places, labels in each_example(data, student, teacher):
        mine, its = ours.logits[0, places], theirs.logits[0, places]
        expected = expected + 0.5 * functional.cross_entropy(mine, labels, reduction="sum")
        expected = expected + functional.kl_div(its.log_softmax(-1), mine.log_softmax(-1), log_target=True, reduction="sum")
    wrapped = causal(student), causal(teacher, teaches=True)
    assert wrapped[0].plain_head
    assert wrapped[0].head_cap == (0.5 if name == "gemma2" else None)
    relation = {"relation": {"weight": 1e-9, "distanceWeight": 1}}  # and what needs the last states has them
    check(begin(data, *wrapped, response={"divergence": "reverseKL"}, **relation), wrapped[0], data, expected)


@pytest.mark.parametrize("attention", [False, True])
def test_feature(data: Examples, attention: bool) -> None:
    """Embeddings with embeddings, the first layer with the second: with projections, since the teacher is wider."""
    student, teacher = llama(4), llama(5, num_hidden_layers=3, hidden_size=48)
    layout: Layout | None = "padded" if attention else None
    pairs = [(1, 2), (-1, -1)]
    form = {"weight": 0.4, "attention": attention, "layers": [{"student": mine, "teacher": its} for mine, its in pairs]}
    wrapped = causal(student, layout), causal(teacher, layout, teaches=True)
    objective = begin(data, *wrapped, labelWeight=0, feature=form)
    projections = [parameter for _, parameter in parameters_of(objective)]
    assert [(name, tuple(parameter.shape)) for name, parameter in parameters_of(objective)] == [
        ("objective.feature.0.projection", (48, 32)),
        ("objective.feature.1.projection", (48, 32)),
    ]
    before = student.config._attn_implementation
    expected = torch.zeros(())
    for ours, theirs, places, _ in each_example(data, student, teacher):
        for (mine, its), projection in zip(pairs, projections, strict=True):
            mapped = ours.hidden_states[mine][0, places] @ projection.T
            expected = expected + 0.4 / 2 * (mapped - theirs.hidden_states[its][0, places]).square().sum() / 48
            if attention:
                layers = (mine - 1, its - 1) if mine > 0 else (mine, its)
                p, q = theirs.attentions[layers[1]][0][:, places], ours.attentions[layers[0]][0][:, places]
                rows = torch.where(p > 0, p * (p.clamp_min(1e-30).log() - q.clamp_min(1e-30).log()), 0.0)
                expected = expected + 0.4 / 2 * rows.sum() / 4
    if not attention:
        for model in (student, teacher):
            model.set_attn_implementation(before)
    check(objective, wrapped[0], data, expected)


def test_relation_between_tokens_and_examples(data: Examples) -> None:
    student, teacher = llama(6), llama(7, hidden_size=48)
    form = {"weight": 0.6, "between": ["tokens", "examples"], "distanceWeight": 1, "angleWeight": 2, "similarityWeight": 3}
    wrapped = causal(student), causal(teacher, teaches=True)
    objective = begin(data, *wrapped, labelWeight=0.5, relation=form)
    before = student.config._attn_implementation
    relations, expected, states = Relations(1, 2, 3), torch.zeros(()), []
    for ours, theirs, places, labels in each_example(data, student, teacher):
        expected = expected + 0.5 * functional.cross_entropy(ours.logits[0, places], labels, reduction="sum")
        mine, its = ours.hidden_states[-1][0, places], theirs.hidden_states[-1][0, places]
        expected = expected + 0.6 * len(places) * relations.loss(mine, its)
        states.append((mine, its))
    for row in ROWS:
        if len(row) > 1:
            pooled = [torch.stack([states[index][model].mean(0) for index in row]) for model in (0, 1)]
            expected = expected + 0.6 * sum(len(states[index][0]) for index in row) * relations.loss(*pooled)
    for model in (student, teacher):
        model.set_attn_implementation(before)
    check(objective, wrapped[0], data, expected)


ALL_FORMS = {
    "response": {"divergence": "jensenShannon"},
    "feature": {"layers": [{"student": 1, "teacher": 1}, {"student": 2, "teacher": 3}]},
    "relation": {"between": ["tokens", "examples"]},
}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_too_few_for_any_relation_is_a_loss_of_nothing(data: Examples, layout: Layout) -> None:
    """One label has no relation to another, nor has one example: the loss is 0 and its gradient too, however the batch is split."""
    labelled = np.zeros(5, np.bool_)
    labelled[-1] = True
    lonely = join([(np.arange(5, dtype=np.int32), labelled)])
    student, taught_by = causal(llama(1), layout), causal(llama(2), layout, teaches=True)
    for between in (["tokens"], ["examples"]):
        objective = begin(data, student, taught_by, labelWeight=0, relation={"between": between})
        loss = objective.loss(student, collate(lonely, ((0,),), layout)).total
        assert float(loss) == 0.0
        gradients = torch.autograd.grad(loss, student.trained_parameters(), allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_split_of_a_batch_gives_the_same_gradient(data: Examples, world: int) -> None:
    student, teacher = causal(llama(8)), causal(llama(9, num_hidden_layers=3, hidden_size=48), teaches=True)
    objective = begin(data, student, teacher, **ALL_FORMS)
    parameters = student.trained_parameters() + [parameter for _, parameter in parameters_of(objective)]
    whole = torch.autograd.grad(objective.loss(student, collate(data, ROWS, "flat")).total, parameters)
    parts = [torch.zeros_like(parameter) for parameter in parameters]
    for rank in range(world):
        for row in rank_share(ROWS, data.lengths(), rank, world):
            made = torch.autograd.grad(objective.loss(student, collate(data, [row], "flat")).total, parameters)
            parts = [part + more for part, more in zip(parts, made, strict=True)]
    for part, reference in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, reference, rtol=1e-4, atol=1e-5)


def test_packed_and_unpacked_rows_have_the_same_loss(data: Examples) -> None:
    """All but the relation between the examples of a row, which there is only in packed ones."""
    student, teacher = causal(llama(8)), causal(llama(9, hidden_size=48), teaches=True)
    objective = begin(data, student, teacher, **(ALL_FORMS | {"relation": {}, "feature": {}}))
    packed = objective.loss(student, collate(data, ROWS, "flat")).total
    unpacked = sum(objective.loss(student, collate(data, [(index,)], "flat")).total for index in range(len(data)))
    torch.testing.assert_close(packed, unpacked, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(data: Examples) -> None:
    student, teacher = causal(llama(10)), causal(llama(10), teaches=True)
    forms = ALL_FORMS | {"feature": {}}
    loss = begin(data, student, teacher, labelWeight=0, **forms).loss(student, collate(data, ROWS, "flat")).total
    assert abs(loss.item()) < 1e-5
    gradients = torch.autograd.grad(loss, student.trained_parameters(), allow_unused=True)
    assert max(float(gradient.abs().max()) for gradient in gradients if gradient is not None) < 1e-4


def test_text_of_an_endpoint_is_learned_as_labels(data: Examples) -> None:
    student = causal(llama(11))
    endpoint = {"teacher": {"endpoint": {"url": "https://models.example.com/v1", "model": "large"}}}
    objective = begin(data, student, None, **endpoint, labelWeight=0.5, response={"weight": 2})
    batch = collate(data, ROWS, "flat")
    torch.testing.assert_close(objective.loss(student, batch).total, 2.5 * Sft().loss(student, batch).total)


def test_bfloat16_stays_near(data: Examples) -> None:
    student, teacher = causal(llama(12)), causal(llama(13), teaches=True)
    batch = collate(data, ROWS, "flat")
    exact = begin(data, student, teacher, **ALL_FORMS | {"feature": {}}).loss(student, batch).total
    rounded = [replace(each, precision=torch.bfloat16) for each in (student, teacher)]
    loss = begin(data, *rounded, **ALL_FORMS | {"feature": {}}).loss(rounded[0], batch).total
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=3e-2, atol=0)
    loss.backward()
