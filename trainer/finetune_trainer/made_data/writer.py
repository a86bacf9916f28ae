"""Who writes texts for made examples, and what has been written, kept: a killed head, and ten jobs with the same data, pay for it once.

    .finetune/cache/made/<key>/<batch>.json    texts by the digest of what the generator was told, in output.storage

The key covers the generator and how much it may write. A generator that keeps its answers itself (an endpoint's) is asked each time.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from finetune_api.reasons import Reason
from finetune_trainer.completions import Messages
from finetune_trainer.data.shelf import Shelf
from finetune_trainer.data_cache import mark_used
from finetune_trainer.errors import JobError
from finetune_trainer.kept_answers import keep, read_kept
from finetune_trainer.manifest import digest_of
from finetune_trainer.storage import Storage

FOLDER = ".finetune/cache/made"
FORMAT = 1
Say = Callable[[str], None]
BATCH = 4096
"""Prompts that a generator is given at a time: many, since for each batch the job's workers may have to be started."""
SAVE_SECONDS = 20.0
"""Work that a killed process loses at most, unless the generator gives its texts in larger portions."""


class Generator(Protocol):
    """A model that writes."""

    def generate(self, prompts: Sequence[Messages], max_new_tokens: int) -> Iterator[str]:
        """What it says to each conversation, in their order. Raises JobError."""
        ...


@dataclass(frozen=True)
class Writer:
    """A generator that is loaded when there is something to write."""

    identity: Mapping[str, Any]
    """What its texts follow from, but for what it is told, and where it is: who can write there is to deceive nobody else. Any JSON."""
    open: Callable[[], AbstractContextManager[Generator]]
    """Load it, for as long as the context lasts. Raises JobError."""
    keeps: bool = False
    """Whether it keeps its answers itself."""


class Desk:
    """A writer at work: texts from the storage, else from the generator. A context."""

    def __init__(self, writer: Writer, max_new_tokens: int, storage: Storage, field: str, say: Say) -> None:
        """`storage` is output.storage; `field` is the generator's in the spec, for messages."""
        self._writer, self._most, self._field, self._say = writer, max_new_tokens, field, say
        key = digest_of({"format": FORMAT, "generator": dict(writer.identity), "maxNewTokens": max_new_tokens})[7:39]
        self._outer, self._name = storage, f"{FOLDER}/{key}"
        self._open = ExitStack()
        self._generator: Generator | None = None
        self._shelf: Shelf | None = None
        self._number, self._seconds = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, prompts: Sequence[Messages]) -> list[str]:
        """A text for each, which may be empty; the same for the same.

        Raises JobError (GeneratorUnavailable, and what the generator raises; StorageFull, StorageUnavailable).
        """
        names = [digest_of({"messages": [dict(message) for message in messages]})[7:39] for messages in prompts]
        texts = {name: text for name in names if (text := self._known(name)) is not None}
        new = {name: messages for name, messages in zip(names, prompts, strict=True) if name not in texts}
        if new:
            texts |= self._written(new)
        return [texts[name] for name in names]

    def _known(self, name: str) -> str | None:
        if self._writer.keeps:
            return None
        if self._shelf is None:
            self._shelf = self._open.enter_context(Shelf())
            mark_used(self._outer, self._name)
            for digest, text in read_kept(self._outer.at(self._name)):
                if isinstance(text, str):
                    self._shelf.put(digest.encode(), text.encode(errors="replace"))
        content = self._shelf.get(name.encode())
        return None if content is None else content.decode()

    def _written(self, new: Mapping[str, Messages]) -> dict[str, str]:
        """The generator's texts. What has come is kept even where an error, or a call to stop, ends the rest."""
        if self._generator is None:
            self._generator = self._open.enter_context(self._writer.open())
        names, texts, kept = list(new), dict[str, str](), 0
        begun = saved = time.monotonic()
        try:
            for text in self._generator.generate(list(new.values()), self._most):
                if len(texts) < len(names):
                    texts[names[len(texts)]] = text.encode(errors="replace").decode()  # an endpoint may send half a character
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._keep(dict(list(texts.items())[kept:]))
                    kept, saved = len(texts), time.monotonic()
                    self._tell(self._number + kept, self._seconds + saved - begun)
        finally:
            self._keep(dict(list(texts.items())[kept:]))
        self._number, self._seconds = self._number + len(texts), self._seconds + time.monotonic() - begun
        if len(texts) < len(names):
            problem = f"{self._field}: the generator has written {len(texts):,} texts for {len(names):,} prompts"
            raise JobError(Reason.GENERATOR_UNAVAILABLE, problem)
        return texts

    def _tell(self, number: int, seconds: float) -> None:
        """Say how far it is; a generator that keeps its answers says so itself."""
        if not self._writer.keeps:
            texts = "1 text is" if number == 1 else f"{number:,} texts are"
            self._say(f"{self._field}: {texts} written after {seconds:,.0f} s")

    def _keep(self, texts: Mapping[str, str]) -> None:
        """Keep texts for other attempts, those that say something: another time an empty one may be another."""
        said = {name: text for name, text in texts.items() if text.strip()}
        if self._shelf is None:
            return
        for name, text in said.items():
            self._shelf.put(name.encode(), text.encode())
        keep(self._outer.at(self._name), said)
