"""Soft prompts, by PEFT: what is trained stands before every example, and the model itself stays as it was.

- `promptTuning` (Lester et al. 2021): embeddings
- `pTuning` (Liu et al. 2021): embeddings that come from a small encoder, which is not needed any more after the training
- `prefixTuning` (Li and Liang 2021): keys and values of every layer
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune_api.reasons import Reason
from finetune_api.status import ArtifactKind
from finetune_api.v1alpha1 import PrefixTuningMethod, PromptTuningMethod, PTuningMethod
from finetune_trainer.errors import JobError
from finetune_trainer.methods.method import BaseModel
from finetune_trainer.methods.peft_models import ADAPTER, save_adapter, with_adapter, without_recomputation

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREFIX_SCALE = 0.02
"""Standard deviation that keys and values begin with: much smaller than those of words, so that the model begins nearly as it was."""
_WITHOUT_KEYS = {"conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent"}
"""What transformers calls the layers that keep a state along the row in place of keys and values."""


@dataclass(frozen=True)
class SoftPrompt:
    """One of the three as the spec asks for it."""

    spec: PromptTuningMethod | PrefixTuningMethod | PTuningMethod

    freezes_base = True

    @property
    def virtual_tokens(self) -> int:
        """Places that the prompt takes before each example."""
        return self.spec.num_virtual_tokens

    def apply(self, model: torch.nn.Module, *, seed: int, tokenizer: "PreTrainedTokenizerBase | None" = None) -> torch.nn.Module:
        """The PEFT model around the frozen one, with a prompt in float32.

        A prompt of embeddings begins with those of the text, or of words that are drawn from the vocabulary.
        Raises JobError (InvalidSpec) where PEFT knows no such prompt for the architecture, or the text has no tokens.
        """
        text = self.spec.init_text if isinstance(self.spec, PromptTuningMethod) else None
        words = _tokens(text, tokenizer, self.virtual_tokens) if text is not None else None
        with without_recomputation(model):
            wrapped: Any = with_adapter(model, self._config(), seed=seed, field=self._field)
            _try_prompt(wrapped, self._field)
        encoder = wrapped.prompt_encoder[ADAPTER]
        with torch.no_grad():
            if isinstance(self.spec, PrefixTuningMethod) and self.spec.projection_size is None:
                encoder.embedding.weight.mul_(PREFIX_SCALE)
            if words is not None:
                embeddings = cast("PreTrainedModel", model).get_input_embeddings().weight
                encoder.embedding.weight.copy_(embeddings[words.to(embeddings.device)])
        return cast("torch.nn.Module", wrapped)

    @property
    def _field(self) -> str:
        kinds = {PromptTuningMethod: "promptTuning", PrefixTuningMethod: "prefixTuning", PTuningMethod: "pTuning"}
        return f"method.{kinds[type(self.spec)]}"

    def _config(self) -> "PeftConfig":
        from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

        spec, shared = self.spec, {"task_type": "CAUSAL_LM", "num_virtual_tokens": self.virtual_tokens}
        if isinstance(spec, PrefixTuningMethod):
            projection = {"prefix_projection": True, "encoder_hidden_size": spec.projection_size} if spec.projection_size else {}
            return PrefixTuningConfig(**shared, **projection)
        if isinstance(spec, PTuningMethod):
            return PromptEncoderConfig(
                **shared,
                encoder_reparameterization_type=spec.encoder.upper(),
                encoder_hidden_size=spec.encoder_hidden_size,
                encoder_num_layers=spec.encoder_layers,
                encoder_dropout=spec.encoder_dropout,
            )
        return PromptTuningConfig(**shared, prompt_tuning_init="SAMPLE_VOCAB")

    def export(self, model: torch.nn.Module, folder: Path, base: BaseModel, kind: ArtifactKind) -> None:
        """A PEFT folder with the prompt itself; an encoder that it came from is left out."""
        del kind  # an adapter is all that it makes
        was_training = model.training
        model.eval()  # an encoder's dropout is not to be in what it gives
        try:
            save_adapter(model, folder, base)
        finally:
            model.train(was_training)


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase | None", count: int) -> torch.Tensor:
    """The text's tokens, repeated or cut to a count."""
    if tokenizer is None:
        raise ValueError("a prompt that begins with text needs the model's tokenizer")
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise JobError(Reason.INVALID_SPEC, "method.promptTuning.initText has no tokens for the model's tokenizer")
    return torch.tensor(list(itertools.islice(itertools.cycle(tokens), count)))


def _try_prompt(model: Any, field: str) -> None:  # noqa: ANN401 - a PEFT model, which has no types
    """Have PEFT make the prompt once: what it cannot make for an architecture it says only then."""
    config = model.get_base_model().config
    others = _WITHOUT_KEYS.intersection(getattr(config.get_text_config(), "layer_types", None) or ())
    if others and field.endswith("prefixTuning"):
        kinds = ", ".join(sorted(others))
        raise JobError(
            Reason.INVALID_SPEC, f"{field}: {config.model_type} has layers that take no keys and values ({kinds}); use method.promptTuning"
        )
    try:
        with torch.no_grad():
            model.get_prompt(batch_size=1)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise JobError(Reason.INVALID_SPEC, f"{field}: PEFT makes no such prompt for {config.model_type} models: {error}") from error
