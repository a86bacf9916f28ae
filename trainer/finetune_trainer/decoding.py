"""Greedy decoding: a model goes on with rows of tokens, each with the likeliest next one, until it ends them or there is no room.

Several rows at once, padded on the left, with the keys and values of what was read kept. A soft prompt stands after the padding, before a
row's own tokens, as it did in training. Whether a model can be computed so is found out by trying: what it makes of a few tokens must be
what it makes of them in training's way. Where it is not (a state that runs along the row, an attention of its own), every token is computed
in that way from the beginning: slow, and right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune_trainer.data.examples import join
from finetune_trainer.data.tensors import MicroBatch, collate
from finetune_trainer.methods.peft_models import without_recomputation
from finetune_trainer.model import CausalModel
from finetune_trainer.sharding import gather_root
from finetune_trainer.soft_prompts import CACHED, EMBEDDED, prefix_of, prompt_type
from finetune_trainer.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[Sequence[int]]
_PROBE = ((8, 6, 2, 9, 1), (3, 4, 5))
"""Rows of several lengths, of tokens that every vocabulary has."""
_NEXT = 7


class Lockstep:
    """Forward passes that all workers make together, since each holds a part of every layer; for a model that is whole, nothing."""

    def __init__(self, model: CausalModel, worker: Worker) -> None:
        self._model, self._worker = model, worker

    def before(self) -> None:
        """Called before each forward pass."""
        if self._model.sharded:
            self._worker.sum(1.0)

    def finish(self) -> None:
        """Called by a worker that has no more to compute: it takes part until no other has."""
        if not self._model.sharded:
            return
        with torch.no_grad():
            while self._worker.sum(0.0) > 0:
                self._model.run(_batch([_PROBE[1]], self._model))


class Decoder:
    """Goes on with rows. Every worker makes one where the model is sharded."""

    def __init__(self, model: CausalModel, worker: Worker | None = None) -> None:
        self.model = model
        self.lockstep = Lockstep(model, worker or Worker())
        self._worker = worker or Worker()
        self._taken = set(signature(model.transformer.forward).parameters)
        self._keeps: bool | None = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in evaluation mode, its gradients off. Within, `follow` may be called, and training's way be gone as well."""
        module = self.model.module
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad(), without_recomputation(self.model.transformer):
                if self._keeps is None:
                    self._keeps = self._agreed(self._is_fit())
                yield
        finally:
            module.train(was_training)

    @property
    def keeps(self) -> bool:
        """Whether keys and values are kept. Known once it has been ready."""
        return bool(self._keeps)

    def follow(self, rows: Rows, most: Sequence[int], ends: frozenset[int]) -> list[list[int]]:
        """What follows each row, at most so many tokens, up to one of `ends`, which is left out. No row is empty, nor is there none.

        Raises torch.OutOfMemoryError.
        """
        made: list[list[int]] = [[] for _ in rows]
        left = [index for index, count in enumerate(most) if count > 0]
        if not left:
            return made
        with self._padding() if self._keeps else nullcontext():
            state: _Kept | _Anew = (_Kept if self._keeps else _Anew)(self, [rows[index] for index in left])
            logits = state.read()
            while True:
                tokens = logits.argmax(dim=-1).tolist()
                going = []
                for place, (index, token) in enumerate(zip(left, tokens, strict=True)):
                    if token not in ends:
                        made[index].append(token)
                        going += [place] if len(made[index]) < most[index] else []
                if not going:
                    return made
                if len(going) < len(left):
                    left = [left[place] for place in going]
                    state.keep(going)
                logits = state.read([tokens[place] for place in going])

    def takes(self, name: str) -> bool:
        """Whether the model's forward has an argument."""
        return name in self._taken

    def _agreed(self, fit: bool) -> bool:
        """The same answer for all workers."""
        return self._worker.least(int(fit)) > 0 if self.model.sharded else fit

    def _is_fit(self) -> bool:
        """Whether rows of several lengths come out as they do alone, and go on so."""
        transformer = self.model.transformer
        if transformer._is_stateful or not self.takes("past_key_values") or not self.takes("attention_mask"):
            return False
        alone = [_Anew(self, [row]) for row in _PROBE]
        expected = torch.cat([torch.cat([each.read(), each.read([_NEXT])]) for each in alone]).float()
        try:
            with self._padding():
                together = _Kept(self, _PROBE)
                found = torch.stack([together.read(), together.read([_NEXT] * len(_PROBE))], dim=1).flatten(0, 1).float()
                together.keep([1])
        except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, IndexError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError) or self.model.sharded:  # the others wait for this one
                raise
            return False
        rounding = 1e-3 if self.model.precision == torch.float32 and expected.dtype == torch.float32 else 5e-2
        return bool((found - expected).abs().max() <= rounding * expected.abs().max())

    @contextmanager
    def _padding(self) -> Iterator[None]:
        """An attention of transformers' own, which knows of padding."""
        transformer = self.model.transformer
        before = transformer.config._attn_implementation
        if self.model.layout == "flat":
            _set_attention(transformer)
        try:
            yield
        finally:
            if self.model.layout == "flat":
                transformer.set_attn_implementation(before)


def _set_attention(transformer: "PreTrainedModel") -> None:
    try:
        transformer.set_attn_implementation("sdpa")
    except ValueError:  # few models know no other
        transformer.set_attn_implementation("eager")


class _Kept:
    """Rows that are read once: their keys and values are kept. `read` gives the logits [B, V] of what comes next."""

    def __init__(self, decoder: Decoder, rows: Rows) -> None:
        from transformers import DynamicCache

        self._decoder, model = decoder, decoder.model
        self._device = model.device
        width = max(map(len, rows))
        self._ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self._device)
        self._mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self._device)
        self._cache: Any = DynamicCache(config=model.transformer.config)

    def read(self, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """Read the rows, or after that one more token of each."""
        if tokens is None:
            return self._compute(**self._first())
        more = torch.tensor(tokens, device=self._device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(more)], dim=1)
        return self._compute(input_ids=more)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""
        chosen = torch.tensor(places, device=self._device)
        self._mask = self._mask[chosen]
        self._cache.batch_select_indices(chosen)

    def _first(self) -> dict[str, torch.Tensor]:
        """The rows with the soft prompt, if there is one, as the model takes them."""
        model, ids = self._decoder.model, self._ids
        kind = prompt_type(model.module) if model.tuned else None
        if kind == CACHED:
            self._cache = _cache_of(model, len(ids))
            self._mask = torch.cat([self._mask.new_ones(len(ids), model.virtual_tokens), self._mask], dim=1)
        if kind not in EMBEDDED:
            return {"input_ids": ids}
        if model.sharded:
            gather_root(model.transformer)
        peft_model: Any = model.module
        words = model.transformer.get_input_embeddings()(ids)
        prompt = peft_model.get_prompt(batch_size=1)[0].to(words.dtype)
        count = len(prompt)
        embeddings = torch.cat([words.new_zeros(len(ids), count, words.shape[2]), words], dim=1)
        for line, mask, embedded in zip(embeddings, self._mask, words, strict=True):
            padding = int((mask == 0).sum())
            line[padding : padding + count] = prompt
            line[padding + count :] = embedded[padding:]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), count)], dim=1)
        return {"inputs_embeds": embeddings}

    def _compute(self, **inputs: torch.Tensor) -> torch.Tensor:
        decoder, model = self._decoder, self._decoder.model
        arguments: dict[str, Any] = {**inputs, "attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        new = next(iter(inputs.values())).shape[1]
        if decoder.takes("position_ids"):
            arguments["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
        if decoder.takes("logits_to_keep"):
            arguments["logits_to_keep"] = 1
        decoder.lockstep.before()
        with model.autocast():
            made = model.transformer(**arguments, return_dict=True)
        self._cache = made.past_key_values
        logits: torch.Tensor = made.logits[:, -1].float()
        return logits


def _cache_of(model: CausalModel, lines: int) -> Any:  # noqa: ANN401 - a type of transformers
    """The trained prefix as the past of every line."""
    from transformers import DynamicCache

    prefix = prefix_of(model.module)
    dtype = model.precision if model.precision == torch.bfloat16 else prefix.keys[0].dtype
    every = zip(prefix.keys, prefix.values, strict=True)
    return DynamicCache([tuple(tensor.to(dtype).expand(lines, -1, -1, -1) for tensor in pair) for pair in every])


class _Anew:
    """Rows that are computed from the beginning for every token, in training's way."""

    def __init__(self, decoder: Decoder, rows: Rows) -> None:
        self._decoder = decoder
        self._rows = [list(row) for row in rows]

    def read(self, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """The logits [B, V] of what comes next."""
        for row, token in zip(self._rows, tokens if tokens is not None else (), strict=tokens is not None):
            row.append(token)
        model = self._decoder.model
        batch = _batch(self._rows, model)
        self._decoder.lockstep.before()
        outputs = model.run(batch, logits=not model.plain_head)
        lengths = torch.tensor(batch.document_lengths)
        starts = torch.arange(len(lengths)) * batch.input_ids.shape[1] if batch.layout == "padded" else lengths.cumsum(0) - lengths
        last = starts + lengths - 1
        return logits_at(model, outputs.logits if outputs.last is None else outputs.last, last.to(model.device))

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._rows = [self._rows[place] for place in places]


def logits_at(model: CausalModel, made: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    """Float32 logits [N, V] at positions of a flattened batch, of what `model.run` made: the last hidden states, or all logits."""
    assert made is not None  # noqa: S101 - one of the two is there
    chosen = made.flatten(0, 1)[positions]
    if not model.plain_head:
        return chosen.float()
    head = model.head
    hidden = model.before_head(chosen).to(model.precision)
    bias = None if head.bias is None else head.bias.to(model.precision)
    with torch.autocast(model.device.type, enabled=False):
        return model.after_head(torch.nn.functional.linear(hidden, head.weight.to(model.precision), bias).float())


def _batch(rows: Rows, model: CausalModel) -> MicroBatch:
    """Rows as a micro-batch of the model's layout."""
    parts = [(np.array(row, dtype=np.int32), np.zeros(len(row), dtype=np.bool_)) for row in rows]
    return collate(join(parts), [(index,) for index in range(len(rows))], model.layout).to(model.device)


@dataclass(frozen=True)
class Bounds:
    """How much is decoded at once."""

    tokens: int
    """Positions of rows, padding, soft prompts and what is to follow included; at least one row."""
    rows: int = 256

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of rows of these lengths (all that they may become) in batches of nearly the same length, the longest first."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            if batch and (len(batch) == self.rows or (len(batch) + 1) * lengths[batch[0]] > self.tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch
