"""Writes the conversations the tiny base model is pretrained on.

The corpus is generated from the phrases in tiny_llama_corpus.json: support questions about many invented products whose
answers are drawn at random, small talk, and lines to copy. Random answers are the point: the model learns how a short,
polite reply sounds and which kinds of question there are, but it cannot learn any product's facts, which is what the
quickstart then tunes into it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, str]
Conversation = list[Message]
Phrases = Mapping[str, Any]

SLOT = re.compile(r"\{([A-Za-z]\w*)\}")
WORD = re.compile(r"[\w@.'-]*\w")
SUPPORT_SHARE = 0.55
CHAT_SHARE = 0.15
SYSTEM_SHARE = 0.10
SECOND_TURN_SHARE = 0.10
FRAME_SHARE = 0.35


def load_phrases(path: Path) -> Phrases:
    """Reads the phrase file."""
    phrases: Phrases = json.loads(path.read_text(encoding="utf-8"))
    return phrases


def strings_in(value: object) -> Iterator[str]:
    """Walks nested JSON and yields every string value in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_in(item)


def words_of(text: str) -> list[str]:
    """Splits text into words, leaving out slots and closing punctuation."""
    return WORD.findall(SLOT.sub(" ", text))


def vocabulary(phrases: Phrases, facts: Mapping[str, Any]) -> list[str]:
    """Collects every word the model should be able to say.

    The words of the tuning data are in it because a token that was never seen in pretraining keeps a random embedding,
    which an adapter cannot repair. They are shown only as shuffled single words, so no fact can be read from them.
    """
    words = {word for text in strings_in(phrases) for word in words_of(text)}
    words |= {word for text in strings_in(facts) for word in words_of(text)}
    return sorted(words | set(facts["codes"]))


def fill(template: str, slots: Mapping[str, Sequence[str]], chosen: dict[str, str], rng: random.Random) -> str:
    """Fills the slots of a template; one conversation uses the same value for a slot throughout."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in chosen:
            chosen[name] = fill(rng.choice(slots[name]), slots, chosen, rng)
        return chosen[name]

    return SLOT.sub(value, template)


def framed(question: str, phrases: Phrases, rng: random.Random) -> str:
    """Sometimes adds a greeting or a closing, as people do."""
    if rng.random() < FRAME_SHARE:
        question = f"{rng.choice(phrases['greetings'])} {question}"
    if rng.random() < FRAME_SHARE / 2:
        question = f"{question} {rng.choice(phrases['closings'])}"
    return question


def turn(question: str, answer: str) -> Conversation:
    """A question and its answer as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def upper_first(text: str) -> str:
    """Starts a sentence with a capital where a slot put a lower-case word first."""
    return text[:1].upper() + text[1:]


def support_turn(phrases: Phrases, rng: random.Random) -> Conversation:
    """A support question about a random product, with an answer that is fluent and made up."""
    chosen: dict[str, str] = {}
    intent = rng.choice(phrases["support"])
    question = fill(framed(rng.choice(intent["q"]), phrases, rng), phrases["slots"], chosen, rng)
    answer = fill("{polite}" + rng.choice(intent["a"]) + "{end}", phrases["slots"], chosen, rng)
    return turn(upper_first(question), upper_first(answer))


def chat_turn(phrases: Phrases, rng: random.Random) -> Conversation:
    """A bit of small talk."""
    chosen: dict[str, str] = {}
    topic = rng.choice(phrases["chat"])
    question = fill(rng.choice(topic["q"]), phrases["slots"], chosen, rng)
    answer = fill(rng.choice(topic["a"]), phrases["slots"], chosen, rng)
    return turn(upper_first(question), upper_first(answer))


def copy_turn(phrases: Phrases, words: Sequence[str], rng: random.Random) -> Conversation:
    """A line to repeat, which gives every word of the vocabulary a trained embedding."""
    line = " ".join(rng.sample(words, rng.randint(2, 10)))
    return turn(rng.choice(phrases["copy"]).replace("{words}", line), line)


def one_turn(phrases: Phrases, words: Sequence[str], rng: random.Random) -> Conversation:
    """Draws a question and answer of a random kind."""
    kind = rng.random()
    if kind < SUPPORT_SHARE:
        return support_turn(phrases, rng)
    if kind < SUPPORT_SHARE + CHAT_SHARE:
        return chat_turn(phrases, rng)
    return copy_turn(phrases, words, rng)


def conversation(phrases: Phrases, words: Sequence[str], rng: random.Random) -> Conversation:
    """A conversation of one or two turns, sometimes with a system message."""
    messages: Conversation = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(phrases["systems"])})
    messages += one_turn(phrases, words, rng)
    if rng.random() < SECOND_TURN_SHARE:
        messages += one_turn(phrases, words, rng)
    return messages


def conversations(phrases: Phrases, words: Sequence[str], seed: int) -> Iterator[Conversation]:
    """An endless, reproducible stream of conversations."""
    rng = random.Random(seed)  # noqa: S311 (reproducible text, no secrets)
    while True:
        yield conversation(phrases, words, rng)
