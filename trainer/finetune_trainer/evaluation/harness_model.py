"""The model as lm-evaluation-harness asks it: any method's, whole or sharded, computed as everywhere here.

Every worker runs the harness over all examples, so that the same are shown before a question however many workers there are; what the
model is asked they share out, and tell one another. Imported only where lm-eval is installed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune_api.reasons import Reason
from finetune_trainer.data.examples import Examples, join
from finetune_trainer.errors import JobError
from finetune_trainer.evaluation.answered import Answered
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 256
"""Tokens of an answer where a task does not say how many, as the harness has it."""
LONGEST = 2048
"""Tokens of an example where the model does not say how many it takes, as the harness has it."""


class Saying(Protocol):
    """An answer to a prompt."""

    @property
    def text(self) -> str:
        """What is said."""


class Asked(Protocol):
    """Whoever computes: generation.Speaker."""

    def replies(self, prompts: Sequence[Sequence[int]], most: int) -> Sequence[Saying]:
        """What the model says to each prompt, at most so many tokens."""

    def measured(self, examples: Examples) -> list[Answered]:
        """Of each example the summed loss of its labels, their number, and how many of them are the most probable."""

    def finish(self) -> None:
        """Let other workers end what they compute, where the model is sharded."""


@dataclass(frozen=True)
class Scored:
    """Tokens of which the last `labels` are asked for."""

    tokens: tuple[int, ...]
    labels: int


class HarnessModel(TemplateLM):
    """What `lm_eval.evaluator.evaluate` takes. Answers are greedy, also where a task would sample."""

    def __init__(self, asked: Asked, tokenizer: "PreTrainedTokenizerBase", context: int | None, worker: Worker) -> None:
        """`context` is how many tokens a prompt and its answer may have together; what is longer loses its beginning."""
        super().__init__()
        self._asked, self.tokenizer, self._context, self._worker = asked, tokenizer, context or LONGEST, worker
        if tokenizer.eos_token_id is None:
            raise JobError(Reason.MODEL_INVALID, "the model's tokenizer has no token that ends a text, which lm-eval needs")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ANN401 - the harness's
        """The tokens of a text, with those that the tokenizer puts before any text, but not twice."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        special = not string.startswith(begin) if add_special_tokens is None else add_special_tokens
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        while special and len(tokens) > 1 and tokens[-1] == self.eot_token_id:  # some tokenizers end every text
            tokens.pop()
        return tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of each text's probability, from its first token to its last, as far back as the model sees."""
        texts = [self._windows(self.tok_encode(request.args[0])) for request in requests]
        found = iter(self._scores([window for windows in texts for window in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each context, up to the first of the texts that end it."""
        asked = [(request.args[0], normalize_gen_kwargs(request.args[1], NEW_TOKENS)) for request in requests]
        made: dict[int, str] = {}
        for most in sorted({int(settings["max_gen_toks"]) for _, settings in asked}):
            places = [place for place in self._own(len(asked)) if asked[place][1]["max_gen_toks"] == most]
            if not places:
                continue
            room = max(1, self._context - most)
            replies = self._asked.replies([self.tok_encode(asked[place][0])[-room:] for place in places], most)
            made |= {place: until(reply.text, asked[place][1]) for place, reply in zip(places, replies, strict=True)}
        self._asked.finish()
        everyones = {int(place): text for part in self._told(json.dumps(made)) for place, text in json.loads(part).items()}
        return [everyones[place] for place in range(len(asked))]

    def _windows(self, tokens: list[int]) -> list[Scored]:
        cut = get_rolling_token_windows(token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self._context - 1, context_len=1)
        return [Scored((*before, *after), len(after)) for before, after in map(make_disjoint_window, cut)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,  # noqa: ANN401 - the harness's
    ) -> list[tuple[float, bool]]:
        return self._scores([Scored((*before, *after)[-self._context :], len(after)) for _, before, after in requests])

    def _scores(self, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The logarithm of the probability of what is asked for, and whether it is what the model would say."""
        own, found = self._own(len(asked)), list[Answered]()
        if own:
            examples = join([(np.array(asked[place].tokens, np.int32), labelled(asked[place])) for place in own])
            found = self._asked.measured(examples)
        self._asked.finish()
        sums = torch.zeros(len(asked), 2, dtype=torch.float64)
        for place, each in zip(own, found, strict=True):
            sums[place] = torch.tensor([-each.loss, float(each.correct == each.labels)])
        sums = sums.to(self._worker.device)
        self._worker.all_reduce(sums)
        return [(value, bool(greedy)) for value, greedy in sums.tolist()]

    def _own(self, count: int) -> range:
        """Places of the requests that this worker answers."""
        return range(self._worker.rank, count, self._worker.world)

    def _told(self, text: str) -> list[str]:
        """What every worker says, by its rank."""
        content = np.frombuffer(text.encode(), np.uint8)
        sizes = torch.zeros(self._worker.world, dtype=torch.float64, device=self._worker.device)
        sizes[self._worker.rank] = len(content)
        self._worker.all_reduce(sizes)
        ends = np.cumsum([0, *map(int, sizes.tolist())])
        whole = torch.zeros(int(ends[-1]), dtype=torch.uint8)
        whole[ends[self._worker.rank] : ends[self._worker.rank + 1]] = torch.from_numpy(content.copy())
        whole = whole.to(self._worker.device)
        self._worker.all_reduce(whole)
        told = whole.cpu().numpy().tobytes()
        return [told[start:end].decode() for start, end in pairwise(ends.tolist())]


def labelled(asked: Scored) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[T]: which tokens are asked for; never the first, which nothing foretells."""
    places = np.arange(len(asked.tokens))
    found: np.ndarray[Any, np.dtype[np.bool_]] = places >= max(1, len(places) - asked.labels)
    return found


def until(text: str, settings: Mapping[str, Any]) -> str:
    """A text up to the first of those that end it."""
    for end in settings.get("until") or ():
        if end:
            text = text.split(end, maxsplit=1)[0]
    return text
