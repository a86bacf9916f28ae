"""A served model that writes texts, as the job's own workers do elsewhere (worker_generator). What it says is kept: it is paid for once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from finetune_api.reasons import Reason
from finetune_trainer.asking import Asker, Count, Say, Served, batch_size, folder_of, identity_of
from finetune_trainer.completions import Messages, Question
from finetune_trainer.data_cache import mark_used
from finetune_trainer.endpoint import Party
from finetune_trainer.storage import Storage


def generator_at(field: str) -> Party:
    """A generator whose endpoint is that field of the spec."""
    return Party(field, "the generator", Reason.GENERATOR_UNAVAILABLE)


class EndpointGenerator:
    """A generator behind an endpoint. A context; in one thread, outside of any event loop."""

    def __init__(self, served: Served, storage: Storage, namespace: str, say: Say) -> None:
        """`storage` is output.storage, `namespace` the job's."""
        self._served, self._storage, self._namespace, self._say = served, storage, namespace, say
        self._askers: dict[int, Asker] = {}
        self._open = ExitStack()
        self.count = Count()
        """What became of the prompts."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        self._askers.clear()

    def generate(self, prompts: Sequence[Messages], max_new_tokens: int) -> Iterator[str]:
        """What the model says to each conversation, in their order, batch after batch; an empty text where it refuses to answer.

        At most `max_new_tokens` tokens, and the endpoint's own maxTokens.
        Raises JobError (GeneratorUnavailable, also where it has answered nothing at all; AuthenticationFailed, InvalidSpec,
        StorageUnavailable).
        """
        asker, size = self._asker(min(max_new_tokens, self._served.endpoint.max_tokens)), batch_size(self._served.endpoint)
        for start in range(0, len(prompts), size):
            batch = [Question(messages=tuple(each)) for each in prompts[start : start + size]]
            for answer in asker.answers(batch):
                yield answer.text if answer is not None else ""
        self._tell(len(prompts))

    def _asker(self, most_tokens: int) -> Asker:
        if most_tokens not in self._askers:
            endpoint = self._served.endpoint.model_copy(update={"max_tokens": most_tokens})
            folder = folder_of(identity_of(endpoint, self._namespace))
            mark_used(self._storage, folder)
            asker = Asker(replace(self._served, endpoint=endpoint), self._storage.at(folder), self.count, self._say)
            self._askers[most_tokens] = self._open.enter_context(asker)
        return self._askers[most_tokens]

    def _tell(self, asked: int) -> None:
        """Say what became of the prompts so far. Raises JobError where not one was answered."""
        count = self.count
        whole = count.asked + count.known
        nothing = count.refused + count.empty
        refused = f"{count.refused:,} refused, the first with {count.first_refusal}" if count.refused else ""
        why = ", ".join(each for each in (refused, f"{count.empty:,} empty" if count.empty else "") if each)
        if whole and nothing == whole:
            what = f"{self._served.endpoint.model} has answered none of {whole:,} prompts: {why}"
            raise self._served.party.failure(f"{what}; check model, and maxTokens where it reasons first")
        if asked:
            words = f"the generator has answered {whole - nothing:,} of {whole:,} prompts ({count.known:,} of them before)"
            words += f"; {why}" if why else ""
            self._say(words + (f"; {count.cut:,} answers are cut off at maxTokens" if count.cut else ""))
