"""The base model: checked cheaply on the head, loaded on the workers, in the number format of the computation.

Only transformers' own architectures and only safetensors are loaded: no code and no pickle of a model's author ever runs.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from finetune_api.planning import loses_precision
from finetune_api.reasons import Reason
from finetune_api.status import ModelSummary
from finetune_api.v1alpha1 import FineTuneJob
from finetune_api.v1alpha1 import Method as MethodSpec
from finetune_trainer.attention import choose_layout, forward_arguments, probe
from finetune_trainer.data.tensors import Layout, MicroBatch
from finetune_trainer.errors import JobError
from finetune_trainer.methods import ModelChange, check_mergeable, method_for
from finetune_trainer.methods.method import BaseModel, count_parameters
from finetune_trainer.methods.peft_models import without_recomputation
from finetune_trainer.model_files import ModelFiles
from finetune_trainer.quantization import quantization_config
from finetune_trainer.sharding import decoder_of, drop_gathered, gather_root
from finetune_trainer.soft_prompts import CACHED, EMBEDDED, prefix_of, prompt_type, prompted, virtual_tokens
from finetune_trainer.sources import explained

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """What a model makes of a micro-batch, in the shape of its input_ids: [1, T] or [B, T] positions."""

    last: torch.Tensor | None
    """[.., .., H]: the last hidden states. None where the logits were asked for."""
    layers: tuple[torch.Tensor, ...] = ()
    """[.., .., H] each: the embeddings, then the output of every layer (the last one after the final norm). Empty unless asked for."""
    attentions: tuple[torch.Tensor, ...] = ()
    """[B, heads, T, T] of every layer. Empty unless asked for; only in the padded layout with attention that makes maps (eager)."""
    logits: torch.Tensor | None = None
    """[.., .., V]. None unless asked for."""


@dataclass(frozen=True)
class CausalModel:
    """A causal language model with its method applied, and what is known of how to compute with it.

    Gradients are made by calling parts of the module, so it is not to be wrapped (DistributedDataParallel): the loop sums the gradients of
    `trained_parameters` over the workers itself, once for each step.
    """

    module: torch.nn.Module
    """The transformers model, or the PEFT model around it: what the method exports and checkpoints."""
    transformer: "PreTrainedModel"
    """The transformers model itself."""
    layout: Layout
    """The layout of micro-batches that it takes."""
    head_scale: float | None
    """What its output layer's products with the last hidden states are multiplied by to be the logits; None where there is more to it."""
    precision: torch.dtype
    """Number format of the computation: float32 or bfloat16."""
    device: torch.device
    tuned: bool = True
    """False for the base model under the method, as `untuned` gives it."""
    sharded: bool = False
    """Whether each worker holds a part of every layer: all of them must then compute it equally often."""
    auto_tokens: int | None = None
    """Tokens that fit into the device's memory at once, where that is known."""

    @property
    def plain_head(self) -> bool:
        """Whether its logits are a linear layer over its last hidden states, times a number or under a soft cap, and nothing else.

        Not where a method has put something of its own beside the output layer.
        """
        return self.head_scale is not None and type(self.transformer.get_output_embeddings()) is torch.nn.Linear

    @property
    def head(self) -> torch.nn.Linear:
        """The output layer. Only where `plain_head` is true."""
        return cast("torch.nn.Linear", self.transformer.get_output_embeddings())

    def before_head(self, last: torch.Tensor) -> torch.Tensor:
        """Last hidden states as the output layer makes logits of them. Only where `plain_head` is true."""
        return last if self.head_scale in (None, 1.0) else last * self.head_scale

    @property
    def head_cap(self) -> float | None:
        """The soft cap of its logits. Only where `plain_head` is true."""
        return _cap_of(self.transformer)

    def after_head(self, products: torch.Tensor) -> torch.Tensor:
        """The logits that the output layer's products become. Only where `plain_head` is true."""
        return products if self.head_cap is None else capped(products, self.head_cap)

    @property
    def virtual_tokens(self) -> int:
        """Places that a soft prompt takes before each example that is computed."""
        return virtual_tokens(self.module) if self.tuned else 0

    @property
    def recomputable(self) -> bool:
        """Whether its layers can compute their activations again: not after a prefix in padded rows, which travels in a cache."""
        return self.layout == "flat" or not self.tuned or prompt_type(self.module) != CACHED

    def run(self, batch: MicroBatch, *, layers: bool = False, attentions: bool = False, logits: bool = False) -> Outputs:
        """What the model makes of a micro-batch that is on its device: always of the examples' own positions, soft prompts taken off.

        The logits of the whole batch are large: where `plain_head` is true, compute those that are needed from the last hidden states.
        """
        if self.sharded:
            gather_root(self.transformer)
        kind = prompt_type(self.module) if self.tuned else None
        own, shown = None, batch
        arguments: dict[str, Any] = {}
        with self.autocast():
            if kind in EMBEDDED:
                own = prompted(self.module, self.transformer, batch)
                shown, arguments["inputs_embeds"] = own.batch, own.embeddings
            elif kind == CACHED:
                arguments["prefix"] = prefix_of(self.module)
            part = self.transformer if logits else self._decoder()
            wanted = {"output_hidden_states": layers, "output_attentions": attentions, "return_dict": True}
            with nullcontext() if self.recomputable else without_recomputation(self.transformer):
                made = part(**forward_arguments(shown, **arguments), **wanted)

        def off(states: torch.Tensor) -> torch.Tensor:
            return own.taken_off(states, batch) if own is not None else states

        every = tuple(off(states) for states in made.hidden_states) if layers else ()
        return Outputs(
            last=None if logits else off(made.last_hidden_state),
            layers=every,
            attentions=tuple(made.attentions) if attentions else (),
            logits=off(made.logits) if logits else None,
        )

    def _decoder(self) -> Callable[..., Any]:
        """The model without its output layer."""
        return decoder_of(self.transformer) if self.sharded else self.transformer.get_decoder()

    def settle(self) -> None:
        """Be ready for parameters to change: drop what was gathered of them for computing."""
        if self.sharded:
            drop_gathered(self.transformer)

    @contextmanager
    def untuned(self) -> Iterator["CausalModel"]:
        """The model without what its method adds: the base model, where the method leaves that as it was."""
        disable = getattr(self.module, "disable_adapter", None)
        with disable() if disable is not None else nullcontext():
            yield replace(self, tuned=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that computes in `precision` whatever the parameters are kept in."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that an optimiser steps, in a fixed order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def precision_for(asked: str, device: torch.device) -> torch.dtype:
    """The number format of the computation: `asked` is training.precision."""
    if asked == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


@dataclass(frozen=True)
class Inspected:
    """What the head learns of a model without its weights."""

    tokenizer: "PreTrainedTokenizerBase"
    summary: ModelSummary


def inspect_model(files: ModelFiles, job: FineTuneJob) -> Inspected:
    """Check on the head, from configuration, tokenizer and file list alone, that the model can be loaded and the method fits it.

    Builds the architecture on the `meta` device. Raises JobError (ModelInvalid, InvalidSpec).
    """
    config = read_config(files)
    tokenizer = load_tokenizer(files)
    model = _empty_model(config, files)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise JobError(Reason.MODEL_INVALID, f"the tokenizer of {files.base.name} has {len(tokenizer)} tokens, its model only {rows}")
    method = method_for(job.spec.method)
    limit = longest_example(files)
    if limit is not None and method.virtual_tokens >= limit:
        field = f"method.{job.spec.method.chosen}.numVirtualTokens is {method.virtual_tokens}"
        raise JobError(Reason.INVALID_SPEC, f"{field}, which leaves no room for an example: {files.base.name} takes {limit} tokens in all")
    tuned = method.apply(model, seed=job.spec.training.seed, tokenizer=tokenizer)
    if "merged" in job.spec.artifacts:
        check_mergeable(tuned)
    return Inspected(tokenizer, count_parameters(tuned))


def longest_example(files: ModelFiles, method: MethodSpec | None = None) -> int | None:
    """Positions that the model was made for, less those that a soft prompt takes; None where the model does not say."""
    limit = getattr(read_config(files).get_text_config(), "max_position_embeddings", None)
    taken = method_for(method).virtual_tokens if method is not None else 0
    return limit - taken if isinstance(limit, int) and limit > 0 else None


def load_tokenizer(files: ModelFiles) -> "PreTrainedTokenizerBase":
    """The model's tokenizer. Raises JobError (ModelInvalid)."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.folder, trust_remote_code=files.trusted, local_files_only=True
        )
    except Exception as error:
        raise _invalid(files, "has no tokenizer that can be loaded", error) from error
    if not tokenizer.is_fast:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} has no tokenizer.json, which is needed to tell the labels from the rest")
    return tokenizer


def load_model(
    files: ModelFiles, job: FineTuneJob, device: torch.device, *, precision: torch.dtype | None = None, method: ModelChange | None = None
) -> CausalModel:
    """The model with the job's method applied, or another, on its device, in training mode. New parameters follow from training.seed alone.

    `precision` is that of the computation, where it is to be on another device than where the model is loaded. Raises JobError
    (ModelInvalid) where weights are missing or damaged.
    """
    method = method or method_for(job.spec.method)
    precision = precision or precision_for(job.spec.training.precision, device)
    quantization = quantization_config(job.spec.model.quantization, precision)
    transformer = load_transformer(files, _kept_in(method, job, files.base, precision), device, quantization)
    layout = choose_layout(transformer)
    if layout == "padded" and job.spec.training.packing:
        log.warning("%s cannot keep packed examples apart; its rows are computed one example a line", files.base.name)
    scale = head_scale(transformer, layout)
    tokenizer = load_tokenizer(files) if method.virtual_tokens else None
    module = method.apply(transformer, seed=job.spec.training.seed, tokenizer=tokenizer).to(device).train()
    return CausalModel(module, transformer, layout, scale, precision, device)


def model_without_weights(
    files: ModelFiles, job: FineTuneJob, precision: torch.dtype, method: ModelChange | None = None
) -> tuple[torch.nn.Module, "PreTrainedModel"]:
    """The module with the method applied and the transformers model in it, as `load_model` has them, on the `meta` device."""
    method = method or method_for(job.spec.method)
    transformer = _empty_model(read_config(files), files).to(_kept_in(method, job, files.base, precision))
    tokenizer = load_tokenizer(files) if method.virtual_tokens else None
    return method.apply(transformer, seed=job.spec.training.seed, tokenizer=tokenizer).train(), transformer


def parameters_of_config(files: ModelFiles) -> int:
    """Parameters of a model, from its configuration alone. Raises JobError (ModelInvalid)."""
    return sum(parameter.numel() for parameter in _empty_model(read_config(files), files).parameters())


def _kept_in(method: ModelChange, job: FineTuneJob, base: BaseModel, precision: torch.dtype) -> torch.dtype:
    """The number format of the weights in memory: the computation's, where they stay frozen and nothing that is published is lost by it."""
    loses = loses_precision(job.spec, base.dtype, str(precision).removeprefix("torch."))
    return precision if method.freezes_base and not loses else torch.float32


def load_transformer(
    files: ModelFiles, dtype: torch.dtype, device: torch.device, quantization: "BitsAndBytesConfig | None" = None
) -> "PreTrainedModel":
    """The model as transformers has it, its weights in a number format, on a device; its linear layers quantized where asked for.

    Raises JobError (ModelInvalid) where weights are missing or damaged.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one line for each percent in a pod's log
    transformer: PreTrainedModel
    try:
        transformer, loading = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=read_config(files),
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},  # straight to where they are computed with, not by way of this machine's memory
            use_safetensors=True,
            trust_remote_code=files.trusted,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if isinstance(error, OSError) and error.errno is not None:  # the disk's or the network's fault, not the model's
            raise explained(error, files.base.name, Reason.MODEL_NOT_FOUND) from error
        raise _invalid(files, "cannot be loaded", error) from error
    if loading["missing_keys"]:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} lacks the weight {sorted(loading['missing_keys'])[0]}")
    return transformer


@torch.no_grad()
def head_scale(model: "PreTrainedModel", layout: Layout) -> float | None:
    """What the output layer's products with the last hidden states are multiplied by to be the logits: for most models 1.

    None where the logits are made of them in another way, found out by comparing.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return None
    batch = probe([[3, 4, 5, 6]], layout).to(model.device)
    model.eval()
    cap = _cap_of(model)
    if cap is not None:
        return 1.0 if _only_caps(model, head, batch, cap) else None
    logits = model(**forward_arguments(batch)).logits
    products = head(model.get_decoder()(**forward_arguments(batch)).last_hidden_state)
    if logits.shape != products.shape:
        return None
    if torch.allclose(logits.float(), products.float(), rtol=1e-4, atol=1e-5):
        return 1.0
    made, of = logits.double(), products.double()
    scale = float((made * of).sum() / of.square().sum())
    rounding = 1e-4 if logits.dtype == torch.float32 else 1e-2
    fits = head.bias is None and bool(torch.allclose(made, of * scale, rtol=rounding, atol=1e-5))
    return scale if fits else None


def capped(products: torch.Tensor, cap: float) -> torch.Tensor:
    """Products under a soft cap."""
    return torch.tanh(products / cap) * cap


def _cap_of(model: "PreTrainedModel") -> float | None:
    """The soft cap that the configuration names for the logits."""
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def _only_caps(model: "PreTrainedModel", head: torch.nn.Linear, batch: MicroBatch, cap: float) -> bool:
    """Whether the logits are the products under the cap, seen where they are of its size: small ones do not show it."""
    last = model.get_decoder()(**forward_arguments(batch)).last_hidden_state
    factor = 2 * cap / max(float(head(last).abs().max()), 1e-6)
    enlarge = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
    try:
        logits, products = model(**forward_arguments(batch)).logits, head(last)
    finally:
        enlarge.remove()
    rounding = 1e-4 if logits.dtype == torch.float32 else 1e-2
    same = logits.shape == products.shape
    return same and torch.allclose(logits.float(), capped(products.float(), cap), rtol=rounding, atol=rounding * cap)


def read_config(files: ModelFiles) -> "PreTrainedConfig":
    """The model's configuration. Raises JobError (ModelInvalid) where it is not one of a causal language model that is supported."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        raw = json.loads((files.folder / "config.json").read_bytes())
        config: PreTrainedConfig = AutoConfig.from_pretrained(files.folder, trust_remote_code=files.trusted, local_files_only=True)
    except Exception as error:
        raise _invalid(files, "has no configuration that transformers knows", error) from error
    own = files.trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own:
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} ({config.model_type}) is not a causal language model")
    config._attn_implementation = None  # an author's choice may name a package that is not here, or code on the hub
    if raw.get("quantization_config"):
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} holds quantised weights; name the model that it was made from")
    return config


def _empty_model(config: "PreTrainedConfig", files: ModelFiles) -> "PreTrainedModel":
    """The architecture without weights, on the `meta` device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=files.trusted)
    except Exception as error:
        raise _invalid(files, "has a configuration that makes no model", error) from error
    if model.get_decoder() is model:  # as of Llama 4's text models, which name a part that they do not have
        why = f"({config.model_type}) cannot be computed without its output layer in this version of transformers; name another model"
        raise JobError(Reason.MODEL_INVALID, f"{files.base.name} {why}")
    return model


def _invalid(files: ModelFiles, what: str, error: Exception) -> JobError:
    detail = str(error).strip().splitlines()
    return JobError(Reason.MODEL_INVALID, f"{files.base.name} {what}: {detail[0] if detail else type(error).__name__}")
