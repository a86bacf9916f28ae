"""What is learnt, read back as text: the tests' tokenizer has one token for each byte."""

import numpy as np
import pytest
from tiny_models import CHATML, byte_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from finetune_api.reasons import Reason
from finetune_trainer.data.encoding import Encoded, Encoder, LossOn
from finetune_trainer.data.formats import Conversation, Example, PromptCompletion, Text
from finetune_trainer.data.rows import Fault, Place
from finetune_trainer.errors import JobError

HERE = Place("train.jsonl", 3)
MARKED = (
    "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<eos>{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REWRITING = (  # as reasoning models do: only the last assistant turn keeps its thoughts
    "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SYSTEM_ONCE = "{% if messages[0].role != 'system' %}[system]Be kind.{% endif %}" + UNMARKED


def chat(*turns: tuple[str, str], **more: object) -> Conversation:
    return Conversation(HERE, tuple({"role": role, "content": content} for role, content in turns), **more)


def encode(example: Example, loss_on: LossOn = "completion", template: str | None = CHATML, length: int = 1000) -> Encoded | Fault:
    (result,) = Encoder(byte_tokenizer(template), loss_on, length).encode([example])
    return result


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist())


def whole_and_learnt(*arguments: object, **more: object) -> tuple[str, str]:
    """The whole example as text, and the part of it that is learnt."""
    encoded = encode(*arguments, **more)
    assert isinstance(encoded, Encoded), encoded
    tokenizer = byte_tokenizer()
    return text_of(tokenizer, encoded.tokens), text_of(tokenizer, encoded.tokens[encoded.labelled])


DIALOGUE = chat(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you"))


def test_prompt_and_completion() -> None:
    assert whole_and_learnt(PromptCompletion(HERE, "2+2=", "4")) == ("2+2=4<eos>", "4<eos>")


def test_of_a_prompt_everything_may_be_learnt() -> None:
    assert whole_and_learnt(PromptCompletion(HERE, "2+2=", "4"), "all") == ("2+2=4<eos>", "2+2=4<eos>")


def test_text_is_learnt_whole() -> None:
    assert whole_and_learnt(Text(HERE, "Once upon")) == ("Once upon<eos>", "Once upon<eos>")


def test_an_end_token_that_is_there_is_not_doubled() -> None:
    assert whole_and_learnt(PromptCompletion(HERE, "a", "b<eos>")) == ("ab<eos>", "b<eos>")


def test_letters_of_several_bytes_are_learnt_whole() -> None:
    assert whole_and_learnt(PromptCompletion(HERE, "naïve 😀 ", "señor 🎉")) == ("naïve 😀 señor 🎉<eos>", "señor 🎉<eos>")


def test_white_space_is_learnt_where_the_tokenizer_trims_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (encoded,) = Encoder(tokenizer, "completion", 100).encode([PromptCompletion(HERE, "x:  ", "  if a:\n  b\n")])
    assert isinstance(encoded, Encoded)
    assert text_of(tokenizer, encoded.tokens[encoded.labelled]) == "  if a:\n  b\n<eos>"


def test_of_a_conversation_the_last_answer_is_learnt() -> None:
    whole, learnt = whole_and_learnt(DIALOGUE)
    assert whole.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello")
    assert learnt == "See you<|im_end|>\n"


def test_or_every_answer() -> None:
    assert whole_and_learnt(DIALOGUE, "assistant")[1] == "Hello<|im_end|>\nSee you<|im_end|>\n"


def test_or_everything() -> None:
    whole, learnt = whole_and_learnt(DIALOGUE, "all")
    assert whole == learnt


def test_a_conversation_that_goes_on_after_the_last_answer() -> None:
    example = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    whole, learnt = whole_and_learnt(example)
    assert whole.endswith("Bye<|im_end|>\n")
    assert learnt == "Hello<|im_end|>\n"


def test_a_conversation_that_begins_with_an_answer() -> None:
    assert whole_and_learnt(chat(("assistant", "Welcome")))[1] == "<|im_start|>assistant\nWelcome<|im_end|>\n"


@pytest.mark.parametrize(("loss_on", "learnt"), [("completion", "See you<eos>"), ("assistant", "Hello<eos>See you<eos>")])
def test_the_templates_own_marks_are_taken(loss_on: LossOn, learnt: str) -> None:
    assert whole_and_learnt(DIALOGUE, loss_on, MARKED)[1] == learnt


def test_a_template_that_adds_a_system_turn() -> None:
    example = chat(("user", "Hi"), ("assistant", "Hello"))
    assert whole_and_learnt(example, "assistant", SYSTEM_ONCE) == ("[system]Be kind.[user]Hi[assistant]Hello<eos>", "Hello<eos>")


def test_a_template_that_rewrites_earlier_turns_still_gives_the_last_answer() -> None:
    assert whole_and_learnt(DIALOGUE, "completion", REWRITING)[1] == "<think></think>See you"


def test_but_not_the_earlier_ones() -> None:
    fault = encode(DIALOGUE, "assistant", REWRITING)
    assert isinstance(fault, Fault)
    assert str(fault).startswith("train.jsonl, line 3: the chat template writes messages[2] differently when others follow")


def test_a_template_that_refuses_is_told_with_its_words() -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
    assert str(encode(DIALOGUE, template=strict)) == "train.jsonl, line 3: the chat template refuses the messages: roles must alternate"


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0].name }}|{% endif %}" + CHATML
    example = chat(("user", "Hi"), ("assistant", "Hello"), tools=({"name": "search"},))
    assert whole_and_learnt(example, template=template)[0].startswith("search|<|im_start|>user")


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}" + CHATML
    fault = encode(DIALOGUE, template=hostile)
    assert isinstance(fault, Fault)
    assert "unsafe" in fault.problem


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(JobError, match="no chat template") as caught:
        encode(DIALOGUE, template=None)
    assert caught.value.reason == Reason.MODEL_INVALID


def test_of_several_chat_templates_one_must_be_the_default() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"short": CHATML, "long": CHATML}
    with pytest.raises(JobError, match="no default") as caught:
        list(Encoder(tokenizer, "completion", 100).encode([DIALOGUE]))
    assert caught.value.reason == Reason.MODEL_INVALID


def test_text_needs_an_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(JobError, match="eos_token") as caught:
        list(Encoder(tokenizer, "all", 10).encode([Text(HERE, "abc")]))
    assert caught.value.reason == Reason.MODEL_INVALID


def test_a_long_example_is_cut_at_its_end() -> None:
    encoded = encode(PromptCompletion(HERE, "12345", "678"), length=7)
    assert isinstance(encoded, Encoded)
    assert text_of(byte_tokenizer(), encoded.tokens) == "1234567"
    assert encoded.labelled.tolist() == [False] * 5 + [True] * 2
    assert (encoded.full_length, encoded.has_labels()) == (9, True)


def test_where_the_prompt_fills_it_nothing_is_left_to_learn() -> None:
    encoded = encode(PromptCompletion(HERE, "12345", "678"), length=5)
    assert isinstance(encoded, Encoded)
    assert not encoded.has_labels()


def test_examples_keep_their_order_with_the_faults_among_them() -> None:
    examples = [chat(("user", "a"), ("assistant", str(number))) for number in range(5)]
    refusing = CHATML.replace("{% for", "{% if messages[-1].content == '2' %}{{ raise_exception('no') }}{% endif %}{% for", 1)
    results = list(Encoder(byte_tokenizer(refusing), "completion", 100).encode(examples))
    assert [isinstance(result, Fault) for result in results] == [False, False, True, False, False]
    learnt = [text_of(byte_tokenizer(), r.tokens[r.labelled]) for r in results if isinstance(r, Encoded)]
    assert learnt == [f"{number}<|im_end|>\n" for number in (0, 1, 3, 4)]
