"""What a training holds in memory, by parts: the one formula, for the plan before a GPU is asked for and for the worker that has one.

Sizes are bytes. Activations are counted from what the decoder's layers keep for the backward pass (norm, attention with a fused kernel,
gated feed-forward part): `WIDE` numbers are float32 whatever is computed in, `narrow` ones have the format of the computation. They were
counted in the trainer's own steps, tensor by tensor; other forms of layers come near.
"""

from dataclasses import dataclass

from finetune_api.counting import Counts
from finetune_api.methods import Method
from finetune_api.status import MemoryParts
from finetune_api.training import Training

STATE_SHARE = 0.75
"""Share of a GPU's memory that weights, gradients and moments may take; the rest is for activations."""
ACTIVATION_SHARE = 0.6
"""Share of the free memory that activations may take: the estimate is rough, and the allocator needs room."""
USABLE_SHARE = 0.92
"""Share of a GPU's memory that a training may come to: the rest is CUDA's own, and what the allocator cannot use."""
AUTO_TOKENS: dict[str, int] = {"cpu": 4096, "cuda": 8192}
"""Positions of a micro-batch with microBatchSize auto, by device, where memory does not say otherwise."""
MOST_TOKENS = 4 * AUTO_TOKENS["cuda"]
"""Tokens of a micro-batch that no GPU computes faster with more."""
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits that exist at once, of each model, by device: on a CPU what its caches hold, 16 MiB in float32; else 256 MiB."""
CHUNK = 1024
"""Most positions whose logits exist at once."""
FULL = 4
"""Bytes of a float32: what trains, its gradient and its moments."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder."""

    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part."""
    keys: int
    """Width of the keys, and of the values."""
    vocabulary: int


@dataclass(frozen=True)
class Kept:
    """Numbers that a layer keeps of each token for the backward pass, as multiples of its widths."""

    wide: float
    """Of the hidden width, in float32: inputs of norms."""
    narrow: float
    """Of the hidden width, in the format of the computation: queries, attention's output, inputs of linear layers that need them."""
    keys: float
    """Of the keys' width."""
    inner: float
    """Of the feed-forward width: both projections, the activation, and the product where the last layer needs its input."""


def kept_by(method: Method) -> Kept:
    """What the layers keep under a method.

    A frozen linear layer needs its weight, not its input; one that trains, or has an update beside it, needs both.
    """
    if method.full is not None or method.freeze is not None:
        return Kept(wide=7, narrow=2, keys=2, inner=4)
    if method.lora is not None:
        return Kept(wide=2, narrow=5, keys=2, inner=4)
    if method.ia3 is not None:
        return Kept(wide=2, narrow=2, keys=4, inner=4)
    if method.adapter is not None:
        return Kept(wide=2, narrow=6 if method.adapter.placement == "houlsby" else 4, keys=2, inner=3)
    return Kept(wide=2, narrow=2, keys=2, inner=3)


def layer_bytes(shape: Shape, kept: Kept, size: int) -> float:
    """Of one token, in one layer; `size` is that of a number in the computation's format."""
    narrow = kept.narrow * shape.hidden + kept.keys * shape.keys + kept.inner * shape.inner
    return kept.wide * FULL * shape.hidden + narrow * size


def _backward_bytes(shape: Shape, size: int) -> float:
    """Of one token, what the backward pass of one layer makes on its way beside what the layer has kept."""
    return (4 * FULL + 2.5 * size) * shape.hidden + 1.5 * size * shape.inner


@dataclass(frozen=True)
class Held:
    """What activations depend on."""

    shape: Shape
    kept: Kept
    size: int
    """Bytes of a number in the computation's format."""
    layers: int
    """Layers whose activations the backward pass needs: those after the first that trains."""

    def each(self, *, recomputed: bool) -> float:
        """Bytes that grow with each token of a micro-batch."""
        # Of a layer that is frozen and has nothing that trains before it, nothing is kept, recomputed or not.
        if not self.layers:
            return self._end
        if not recomputed:
            return self.layers * self._whole + self._end + 0.5 * self.size * self.shape.inner
        return self.layers * self._entry + self._whole + _backward_bytes(self.shape, self.size)

    def bytes(self, tokens: int, logits: int, *, recomputed: bool) -> int:
        """Of a micro-batch, beside its logits: where layers are computed again, the logits have gone before the largest of it comes."""
        if not recomputed or not self.layers:
            return int(tokens * self.each(recomputed=recomputed))
        later = tokens * (self._whole + _backward_bytes(self.shape, self.size)) - logits
        return int(tokens * self.layers * self._entry + max(tokens * self._end, later))

    @property
    def _whole(self) -> float:
        return layer_bytes(self.shape, self.kept, self.size)

    @property
    def _entry(self) -> int:
        """Of one token, the input of a layer: float32 where the weights that make it are."""
        return self.shape.hidden * (FULL if self.kept.wide > self.kept.narrow else self.size)

    @property
    def _end(self) -> float:
        """Of one token, after the last layer: its norm, the rows that go into the output layer, their gradient."""
        return 4.5 * self.size * self.shape.hidden


@dataclass(frozen=True)
class Activations:
    """How a model's activations are to be held."""

    recomputed: bool
    """Whether those within a layer are computed again in the backward pass."""
    tokens: int
    """Tokens that a micro-batch may have."""


def plan_activations(held: Held, training: Training, free: int) -> Activations:
    """What to do with so many free bytes. Activations are recomputed where memory asks for it, or the training does."""
    longest = training.max_sequence_length
    wanted = max(AUTO_TOKENS["cuda"], longest) if training.micro_batch_size == "auto" else training.micro_batch_size * longest
    room = ACTIVATION_SHARE * free
    recomputed = {"always": True, "never": False}.get(training.gradient_checkpointing, wanted * held.each(recomputed=False) > room)
    each = held.each(recomputed=recomputed)
    return Activations(recomputed, max(longest, min(MOST_TOKENS, int(room / each))))


def logits_bytes(shape: Shape, size: int, device: str, *, head_trains: bool, head_size: int) -> int:
    """The logits that exist at once with what becomes of them; the output layer's weights in the computation's format, its gradient.

    `head_size` is the bytes of a number of its weights.
    """
    rows = max(1, min(CHUNK, CHUNK_ELEMENTS[device] // shape.vocabulary))
    chunk = rows * shape.vocabulary * (FULL if size == FULL else FULL + size)
    weights = shape.vocabulary * shape.hidden
    return chunk + (weights * size if head_size != size else 0) + (2 * FULL * weights if head_trains else 0)


PACKED = {"none": None, "int8": 1.0, "nf4": 0.516}
"""Bytes of a packed parameter: four bits, and 0.127 for constants that are quantised themselves (Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True)
class State:
    """What of a training is there whatever the micro-batch."""

    counts: Counts
    size: int
    """Bytes of a frozen number."""
    compute: int
    """Bytes of a number in the computation's format."""
    quantization: str = "none"
    parts: int = 1
    """Into how many parts the model is split (fsdp)."""
    gathered: int = 0
    """Parameters that are whole on a worker while it computes, though they are split: embeddings, output layer, two layers."""

    def memory(self) -> MemoryParts:
        """Weights, gradients and moments. In half precision, trained float32 weights have a copy that is computed with."""
        counts = self.counts
        packed = PACKED[self.quantization]
        frozen = counts.own - counts.trained
        weights = counts.trained * FULL + frozen * self.size
        if packed is not None:
            weights = int(counts.packed * packed) + (frozen - counts.packed) * self.size
        copies = counts.trained * self.compute if self.compute != FULL and self.parts == 1 else 0
        gathered = self.gathered * (FULL if counts.trained else self.size) if self.parts > 1 else 0
        trained = counts.trained + counts.added
        return MemoryParts(
            weights=weights // self.parts + copies + gathered,
            method=counts.added * FULL // self.parts,
            gradients=trained * FULL // self.parts,
            optimizer=2 * trained * FULL // self.parts,
        )
