"""What a model says is what transformers' own `generate` gives for what is published, whatever the method and whatever stands beside it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_method_artifacts import METHODS, job_of
from tiny_models import job_manifest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tuned import shake

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import parse_job
from finetune_trainer import generation
from finetune_trainer.data.cases import case_of
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.examples import join
from finetune_trainer.data.formats import Conversation, PromptCompletion, Text
from finetune_trainer.data.rows import Place
from finetune_trainer.decoding import Bounds
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation import measure
from finetune_trainer.evaluation.answered import Case
from finetune_trainer.generation import Speaker, Voice, references
from finetune_trainer.methods import method_for
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.model import CausalModel, load_model
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.objectives import Sft
from finetune_trainer.worker import Worker

CPU = torch.device("cpu")
PROMPTS = ("Why?", "A much longer question than the others", "b", "Tell me of the sea", "To be or not", "x y z")
NEW = 16
ENDS = [2, 256]
"""What LlamaConfig has by default, and the tokenizer's end token."""


def tuned_model(files: ModelFiles, method: dict[str, object], tokenizer: PreTrainedTokenizerFast) -> CausalModel:
    model = load_model(files, parse_job(job_manifest(method=method), local=True), CPU)
    shake(model.module, 0.3)
    return model


def plain_texts(model: object, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], new: int = NEW) -> list[str]:
    """One after the other, by transformers alone."""
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        made = model.generate(  # type: ignore[attr-defined]
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=ENDS,
            pad_token_id=0,
        )[0].tolist()
        asked = ids["input_ids"][0].tolist()
        after = made[len(asked) :] if made[: len(asked)] == asked else made  # PEFT gives a prompt of embeddings without it
        upto = next((place for place, token in enumerate(after) if token in ENDS), len(after))
        texts.append(tokenizer.decode(after[:upto], skip_special_tokens=True))
    return texts


def said(speaker: Speaker, prompts: Sequence[str], new: int = NEW) -> list[str]:
    asked = [speaker.prompt(Case("0", "", prompt=prompt)) for prompt in prompts]
    return [reply.text for reply in speaker.replies(asked, new)]


@pytest.mark.parametrize("name", METHODS)
def test_a_tuned_model_says_what_its_published_artifact_says(
    name: str, model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    job = job_of(METHODS[name])
    model = tuned_model(model_files, METHODS[name], tokenizer)
    speaker = Speaker(Voice(model, tokenizer, 128))
    found = said(speaker, PROMPTS)
    assert speaker._decoder.keeps
    base = BaseModel(str(model_files.folder), None, "float32")
    kind = job.spec.artifacts[0]
    method_for(job.spec.method).export(model.module, tmp_path, base, kind)
    if kind == "model":
        published = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        published = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_files.folder), str(tmp_path))
    assert found == plain_texts(published.eval(), tokenizer, PROMPTS)
    untuned = plain_texts(AutoModelForCausalLM.from_pretrained(model_files.folder), tokenizer, PROMPTS)
    assert sum(one != other for one, other in zip(found, untuned, strict=True)) >= len(PROMPTS) // 2
    assert model.module.training


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_without_kept_keys_and_values_it_says_the_same(name: str, model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast) -> None:
    speaker = Speaker(Voice(tuned_model(model_files, METHODS[name], tokenizer), tokenizer, 128))
    kept = said(speaker, PROMPTS)
    speaker._decoder._keeps = False
    assert said(speaker, PROMPTS) == kept


def test_an_answer_that_calls_tools_is_measured_as_it_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    """As the chat template has the call, and not as the JSON that other metrics compare."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content or '' }}"
        "{% for call in turn.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"role": "assistant", "content": "Wait.", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    conversation = Conversation(Place("rows.jsonl", 1), ({"role": "user", "content": "Time?"}, call))
    (learnt,) = Encoder(own, "completion", 64).encode([conversation])
    tokens, labelled = references([case_of(conversation, "0")], own, "completion", 64).example(0)
    assert (tokens.tolist(), labelled.tolist()) == (learnt.tokens.tolist(), learnt.labelled.tolist())  # type: ignore[union-attr]
    assert own.decode(tokens[labelled].tolist()).startswith("Wait.[now]")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_each_references_loss_adds_up_to_what_validation_measures(
    name: str, layout: str, model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast
) -> None:
    method = METHODS[name]
    model = tuned_model(model_files, method, tokenizer)
    if layout == "padded":
        model.transformer.set_attn_implementation("sdpa")
        model = CausalModel(model.module, model.transformer, "padded", model.head_scale, model.precision, model.device)
    question = {"role": "user", "content": "Why?"}
    cases = [
        Case("0", " because", prompt="Why not"),
        Case("1", "It is so.", messages=(question,)),
        Case("2", "", prompt="Nothing but a text."),
        Case("3", " no", prompt="A question that is longer than the others, by far"),
    ]
    place = Place("rows.jsonl", 1)
    rows = [
        PromptCompletion(place, "Why not", " because"),
        Conversation(place, (question, {"role": "assistant", "content": "It is so."})),
        Text(place, "Nothing but a text."),
        PromptCompletion(place, "A question that is longer than the others, by far", " no"),
    ]
    data = references(cases, tokenizer, "completion", 64)
    for number, item in enumerate(Encoder(tokenizer, "completion", 64).encode(rows)):
        tokens, labelled = data.example(number)
        assert (tokens.tolist(), labelled.tolist()) == (item.tokens.tolist(), item.labelled.tolist())  # type: ignore[union-attr]
    found = Speaker(Voice(model, tokenizer, 128)).measured(data)
    assert [each.id for each in found] == ["0", "1", "2", "3"]
    assert [each.labels for each in found] == data.label_counts().tolist()
    training = parse_job(job_manifest(method=method, training={"maxSequenceLength": 64}), local=True).spec.training
    for number, each in enumerate(found):
        mean = measure(model, Sft(), {"validation": data.take([number])}, training, Worker())["validation"]
        assert each.loss / each.labels == pytest.approx(mean, rel=1e-5)
    assert sum(each.loss for each in found) / sum(each.labels for each in found) == pytest.approx(
        measure(model, Sft(), {"validation": data}, training, Worker())["validation"], rel=1e-5
    )


def test_a_token_counts_as_found_where_it_is_what_the_model_says(model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast) -> None:
    """A reference that is the model's own answer is found whole, and one with another letter in it is not."""
    speaker = Speaker(Voice(tuned_model(model_files, {"lora": {"rank": 4}}, tokenizer), tokenizer, 128))
    asked = speaker.prompt(Case("0", "", prompt="Why?"))
    with speaker._decoder.ready():
        (own,) = speaker._decoder.follow([asked], [6], frozenset())
    other = [*own[:2], (own[2] + 1) % 200, *own[3:]]
    for answer, least, most in ((own, 6, 6), (other, 2, 5)):
        tokens = torch.tensor([*asked, *answer]).int().numpy()
        labelled = torch.arange(len(tokens)).ge(len(asked)).numpy()
        (found,) = speaker.measured(join([(tokens, labelled)]))
        assert (found.labels, least <= found.correct <= most) == (6, True)


def test_an_answer_ends_where_the_context_does(model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast) -> None:
    """128 positions, 3 of them a soft prompt's: a prompt of 120 tokens leaves room for 5, one of 125 for none."""
    model = tuned_model(model_files, {"promptTuning": {"numVirtualTokens": 3}}, tokenizer)
    voice = Voice(model, tokenizer, 128)
    assert voice.context == 125
    speaker = Speaker(voice)
    speaker._ends = frozenset()
    prompts = [[65] * 120, [66] * 125, [67] * 126, [68] * 10]
    with speaker._decoder.ready():
        lengths = [len(each) for each in speaker._decoder.follow([prompts[0], prompts[3]], [5, 20], frozenset())]
    assert lengths == [5, 20]
    replies = speaker.replies(prompts, 20)
    assert [reply.too_long for reply in replies] == [False, True, True, False]
    assert [bool(reply.text) for reply in replies] == [True, False, False, True]
    assert not any(reply.too_long for reply in Speaker(Voice(model, tokenizer)).replies([[65] * 60], 1))


def test_a_conversation_is_asked_as_its_template_has_it(model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast) -> None:
    model = load_model(model_files, parse_job(job_manifest(), local=True), CPU)
    speaker = Speaker(Voice(model, tokenizer, 128))
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    whole = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert speaker.prompt(Case("0", "", messages=messages)) == tokenizer(whole)["input_ids"]
    assert speaker.prompt(Case("0", "", prompt="")) == [tokenizer.eos_token_id]
    tokenizer_without = type(tokenizer).from_pretrained(model_files.folder)
    tokenizer_without.chat_template = None
    plain = Speaker(Voice(model, tokenizer_without, 128))
    assert plain.prompt(Case("0", "", messages=messages)) == tokenizer("Be brief.\n\nWhy?\n\n")["input_ids"]
    tokenizer_without.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(JobError, match="file, line 3: the chat template refuses the messages: no system turns"):
        Speaker(Voice(model, tokenizer_without, 128)).prompt(Case("0", "", messages=messages, place="file, line 3"))


def test_replies_come_in_the_order_of_their_prompts(model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tuned_model(model_files, {"lora": {"rank": 4}}, tokenizer)
    speaker, one_at_a_time = (Speaker(Voice(model, tokenizer, 128), tokens=tokens) for tokens in (None, 1))
    prompts = [speaker.prompt(Case("0", "", messages=({"role": "user", "content": prompt},))) for prompt in PROMPTS]
    together = speaker.replies(prompts, 8)
    assert together == [reply for prompt in prompts for reply in one_at_a_time.replies([prompt], 8)]
    assert len({reply.text for reply in together}) > 1


def test_batches_hold_rows_of_like_lengths_and_no_more_than_is_asked() -> None:
    assert list(Bounds(100).batches([10, 60, 20, 50, 50])) == [[1], [3, 4], [2, 0]]
    assert list(Bounds(100, rows=1).batches([10, 60])) == [[1], [0]]
    assert list(Bounds(5).batches([10, 60])) == [[1], [0]]
    assert list(Bounds(5).batches([])) == []


class Refusing:
    """A call that raises as torch does where memory is short: at some calls, counted from 1."""

    def __init__(self, call: Any, *refused: int) -> None:
        self.call, self.refused, self.calls = call, refused, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls in self.refused:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.call(*arguments)


def test_answers_and_references_that_do_not_fit_into_memory_are_computed_in_halves(
    model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned_model(model_files, {"lora": {"rank": 4}}, tokenizer)
    undisturbed, short = (Speaker(Voice(model, tokenizer, 128)) for _ in range(2))
    prompts = [list(prompt.encode()) for prompt in PROMPTS]
    data = join([(np.arange(3, 3 + length, dtype=np.int32), np.arange(length) >= 1) for length in (4, 9, 6, 12, 5)])
    replies, measured = undisturbed.replies(prompts, 8), undisturbed.measured(data)
    assert undisturbed.settle(Worker()) == ()

    follow, scores = Refusing(short._decoder.follow, 1, 3), Refusing(generation._scores, 1)
    monkeypatch.setattr(short._decoder, "follow", follow)
    monkeypatch.setattr(generation, "_scores", scores)
    assert short.replies(prompts, 8) == replies
    found = short.measured(data)
    assert [(each.id, each.labels, each.correct) for each in found] == [(each.id, each.labels, each.correct) for each in measured]
    assert [each.loss for each in found] == pytest.approx([each.loss for each in measured], abs=1e-5)
    told = short.settle(Worker())
    assert [text.split(":")[0] for text in told] == ["answers did not fit into memory", "references did not fit into memory"]
    assert short.settle(Worker()) == ()
    follow.refused = scores.refused = ()
    follow.calls = scores.calls = 0
    assert short.replies(prompts, 8) == replies
    assert follow.calls > 1  # what did not fit is not tried again


@pytest.mark.parametrize("asked", ["replies", "measured"])
def test_a_row_that_one_alone_does_not_fit_is_an_error_of_the_job(
    model_files: ModelFiles, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    speaker = Speaker(Voice(load_model(model_files, parse_job(job_manifest(), local=True), CPU), tokenizer, 128))
    never = Refusing(None, *range(1, 100))
    monkeypatch.setattr(speaker._decoder, "follow", never)
    monkeypatch.setattr(generation, "_scores", never)
    field = {"replies": "maxNewTokens", "measured": r"training\.maxSequenceLength"}[asked]
    data = join([(np.arange(3, 9, dtype=np.int32), np.arange(6) >= 1)] * 2)
    call = {"replies": lambda: speaker.replies([[3], [4]], 2), "measured": lambda: speaker.measured(data)}[asked]
    with pytest.raises(JobError, match=f"a single example does not fit into the memory of a worker: lower {field}") as caught:
        call()
    assert caught.value.reason == Reason.GPU_OUT_OF_MEMORY
    assert never.calls == 2
