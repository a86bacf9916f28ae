"""Texts as vectors: any encoder of transformers, or a folder of sentence-transformers (see sentence_layers.py).

The vectors have length one, so that the product of two is the cosine of their angle. As everywhere, only transformers' own architectures
and safetensors are loaded. Texts are computed beside those of their own length, so that little is spent on padding.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from finetune_api.reasons import Reason
from finetune_api.v1alpha1 import ModelSource
from finetune_trainer.errors import JobError
from finetune_trainer.model import load_tokenizer
from finetune_trainer.model_files import ModelFiles, fetch_below, fetch_model
from finetune_trainer.sentence_layers import SentenceLayers, read_layers
from finetune_trainer.sources import Mounts, explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Tokens that are computed at a time, padding included; a longer text is computed alone."""
TOKENISED = 2048
"""Texts whose tokens are in memory at a time, and which are put in the order of their length."""
LONGEST = 512
"""Tokens of a text that are computed where neither the model nor its tokenizer says how many it takes; the rest is cut off."""
_ANY_LENGTH = 1 << 20
"""Tokenizers without a limit give a number that is larger than this."""

Purpose = Literal["query", "document"]
_PROMPTS: Mapping[str | None, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus"), None: ()}
"""Names under which models keep what is put before a text of a purpose."""
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Encoder:
    """An encoder that is ready to embed."""

    name: str
    """The model as the job names it."""
    identity: str
    """Of all that a vector follows from but its text: what is kept of vectors may be kept under this."""
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    layers: SentenceLayers
    longest: int
    """Tokens of a text that it takes; the rest is cut off."""
    prompts: Mapping[str | None, str] = field(default_factory=dict)
    """What is put before a text, by its purpose; None for a text without one."""
    lower: bool = False

    def embed(self, texts: Sequence[str], purpose: Purpose | None = None) -> F32:
        """[N, H] rows of length one, in the texts' order; zeros for a text without a token.

        `purpose` chooses what the model's author wants before the texts, for models that were made with such (E5, BGE, Qwen3-Embedding).
        Raises JobError (ModelInvalid) where the model gives no numbers.
        """
        before = self.prompts.get(purpose, self.prompts.get(None, ""))
        rows: list[F32] = [self._some([before + text for text in part]) for part in _parts(texts)]
        return np.concatenate(rows) if rows else np.zeros((0, self._width()), np.float32)

    def _width(self) -> int:
        return int(self._some(["a"]).shape[1])

    def _some(self, texts: Sequence[str]) -> F32:
        """The vectors of texts that are tokenised together."""
        shown = [text.lower() for text in texts] if self.lower else list(texts)
        tokens: list[list[int]] = self.tokenizer(shown, truncation=True, max_length=self.longest, padding=False)["input_ids"]
        made: F32 | None = None
        for places in by_length([len(each) for each in tokens], BATCH_TOKENS):
            vectors = self._vectors([tokens[place] for place in places])
            made = np.zeros((len(texts), vectors.shape[1]), np.float32) if made is None else made
            made[places] = vectors
        return made if made is not None else np.zeros((len(texts), self._width()), np.float32)

    @torch.inference_mode()
    def _vectors(self, tokens: Sequence[Sequence[int]]) -> F32:
        """[N, H] of texts with at least a token each. Padding stands behind: no architecture sees a text at other places than alone."""
        longest = max(map(len, tokens))
        filler = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*each, *[filler] * (longest - len(each))] for each in tokens], device=self.model.device)
        lengths = torch.tensor([len(each) for each in tokens], device=self.model.device)
        mask = (torch.arange(longest, device=self.model.device) < lengths[:, None]).long()
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors: F32 = self.layers.vectors(states, mask).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise JobError(Reason.MODEL_INVALID, f"{self.name} embeds a text as something that is no number")
        return vectors


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[start : start + TOKENISED] for start in range(0, len(texts), TOKENISED))


def by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of texts that are computed together, the longest first: at most `most` tokens with padding. Those of length 0 are left out."""
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if lengths[place] == 0:
            break
        if together and lengths[together[0]] * (len(together) + 1) > most:
            yield together
            together = []
        together.append(place)
    if together:
        yield together


def load_encoder(
    source: ModelSource, mounts: Mounts, cache: Path, where: str, *, revision: str | None = None, device: torch.device | None = None
) -> Encoder:
    """Fetch and load an encoder. `where` is its field in the spec, for messages; `revision` is what an earlier attempt resolved.

    Raises JobError (ModelNotFound, ModelInvalid, UnsafeModelFormat, AuthenticationFailed, SecretNotFound, StorageUnavailable).
    """
    try:
        files = fetch_model(source, mounts, cache, weights=True, revision=revision)
        said = _settings(files, "modules.json")
        try:
            layers = read_layers(lambda name: fetch_below(source, mounts, cache, files, name), said)
        except (ValueError, SafetensorError) as error:
            raise JobError(Reason.MODEL_INVALID, f"{files.base.name}: {error}") from error
        return _loaded(files, layers, device or torch.device("cpu"))
    except JobError as error:
        raise JobError(error.reason, f"{where}: {error.message}") from error


def _loaded(files: ModelFiles, layers: SentenceLayers, device: torch.device) -> Encoder:
    tokenizer, model = load_tokenizer(files), _model(files, device)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise JobError(Reason.MODEL_INVALID, f"the tokenizer of {files.base.name} has {len(tokenizer)} tokens, its model only {rows}")
    own, whole = (_mapping(files, f"{name}.json") for name in ("sentence_bert_config", "config_sentence_transformers"))
    longest = min(_limits(model, tokenizer, own.get("max_seq_length")))
    prompts, lower = _prompts(whole), own.get("do_lower_case") is True
    follows = [files.revision, layers.digest, longest, sorted((str(key), value) for key, value in prompts.items()), lower]
    identity = hashlib.sha256(json.dumps(follows).encode()).hexdigest()
    encoder = Encoder(files.base.name, identity, model, tokenizer, layers, longest, prompts, lower)
    try:
        encoder.embed(["a word", "two words"])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise _invalid(files, "cannot embed a text", error) from error
    return encoder


def _model(files: ModelFiles, device: torch.device) -> "PreTrainedModel":
    """The model in float32, in evaluation mode, its attention transformers' own."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise _invalid(files, "has no configuration that transformers knows", error) from error
    encodes = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    of_text = isinstance(getattr(config, "vocab_size", None), int) and (encodes or type(config) in MODEL_MAPPING)
    if not of_text or getattr(config, "quantization_config", None) is not None:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} ({config.model_type}) is no encoder of texts that can be loaded")
    config._attn_implementation = None  # an author's choice may name a package that is not here, or code on the hub
    try:
        model, loading = (AutoModelForTextEncoding if encodes else AutoModel).from_pretrained(
            files.folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise explained(error, files.base.name, Reason.MODEL_NOT_FOUND) from error
        raise _invalid(files, "cannot be loaded", error) from error
    # Many are published without the pooler, which is for another end than this.
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name.split("."))
    if missing:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} lacks the weight {missing[0]}")
    placed: PreTrainedModel = model.to(device).eval().requires_grad_(requires_grad=False)
    return placed


def _limits(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", said: Any) -> Iterator[int]:  # noqa: ANN401 - any JSON
    """Numbers of tokens that a text may have, by all that say so."""
    limits = [limit for limit in (said, tokenizer.model_max_length) if isinstance(limit, int) and 0 < limit < _ANY_LENGTH]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - _unused_positions(model))
    yield from limits or [LONGEST]


def _unused_positions(model: "PreTrainedModel") -> int:
    """Positions that no token has: RoBERTa and its kin begin to count behind the one of padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _prompts(said: Mapping[str, Any]) -> dict[str | None, str]:
    """What is put before a text, by its purpose, of what the model's author has written down."""
    named = said.get("prompts")
    texts = {name: text for name, text in named.items() if isinstance(text, str)} if isinstance(named, dict) else {}
    usual = texts.get(str(said.get("default_prompt_name")), "")
    return {purpose: next((texts[name] for name in names if name in texts), usual) for purpose, names in _PROMPTS.items()}


def _settings(files: ModelFiles, name: str) -> Any | None:  # noqa: ANN401 - any JSON
    """The JSON of a file beside the model; None where it is absent. Raises JobError (ModelInvalid) where it is none."""
    path = files.folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name}/{name} is not JSON") from error


def _mapping(files: ModelFiles, name: str) -> Mapping[str, Any]:
    found = _settings(files, name)
    return found if isinstance(found, dict) else {}


def _invalid(files: ModelFiles, what: str, error: Exception) -> JobError:
    detail = str(error).strip().splitlines()
    return JobError(Reason.MODEL_INVALID, f"{files.base.name} {what}: {detail[0] if detail else type(error).__name__}")
