"""How the weights change: one model for each method, and the union of them by presence."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import ModulePattern, SpecModel, check, check_distinct, check_exactly_one, exactly_one, rule, rules

_ALL_LINEAR_ALONE = rule("!self.exists(name, name == 'all-linear') || self.size() == 1", "all-linear stands alone")


def _check_all_linear(names: tuple[str, ...]) -> tuple[str, ...]:
    check("all-linear" not in names or len(names) == 1, _ALL_LINEAR_ALONE["message"])
    return names


_Modules = Annotated[
    tuple[ModulePattern, ...],
    Field(min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"}),
    AfterValidator(check_distinct),
]
_ShareDropped = Annotated[float, Field(ge=0, lt=1)]
_VirtualTokens = Annotated[int, Field(ge=1, le=4096)]
_Width = Annotated[int, Field(ge=1, le=65536)]


class FullMethod(SpecModel):
    """Every weight is trained."""


class FreezeMethod(SpecModel):
    """A part of the weights is trained as it is; all others are frozen. Exactly one of lastLayers and modules."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("lastLayers", "modules")))

    last_layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of the model's last layers that are trained."""
    modules: _Modules | None = None
    """Names of the modules that are trained, with all that is in them: layers.11, mlp.down_proj, norm; * stands for any characters."""
    embeddings: bool = False
    """Whether the input embeddings are trained too."""
    head: bool = False
    """Whether the output layer is trained too. In a model that ties it to the input embeddings these are the same weights."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        check_exactly_one(self, "lastLayers", "modules")
        return self


class LoraMethod(SpecModel):
    """Low-rank updates beside frozen weights (Hu et al. 2021, LoRA)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update of each weight matrix."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """Scale: the update is multiplied by alpha / rank (rslora: by alpha / sqrt(rank))."""
    dropout: _ShareDropped = 0.0
    """Share of the update's inputs that is dropped while training."""
    target_modules: Annotated[
        tuple[ModulePattern, ...],
        Field(min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set", **rules(_ALL_LINEAR_ALONE)}),
        AfterValidator(check_distinct),
        AfterValidator(_check_all_linear),
    ] = ("all-linear",)
    """Names of the modules that get an update; all-linear is every linear layer but the output layer."""
    variant: Literal["none", "dora", "rslora", "pissa"] = "none"
    """dora trains the weights' magnitude apart from their direction (Liu et al. 2024), rslora scales by the root of the rank
    (Kalajdzievski 2023), pissa begins with the weights' principal components (Meng et al. 2024)."""


class AdapterMethod(SpecModel):
    """Bottleneck layers inside a frozen model (Houlsby et al. 2019; Pfeiffer et al. 2021): a projection down and up, with a residual."""

    reduction_factor: Annotated[float, Field(ge=1, le=65536)] = 16
    """The bottleneck is the model's width divided by this."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Function between the two projections."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """houlsby: after attention and after feed-forward; pfeiffer: after feed-forward alone."""
    dropout: _ShareDropped = 0.0
    """Share of the adapter's inputs that is dropped while training."""


_FEED_FORWARD_ARE_TARGETS = rule(
    "!has(self.feedForwardModules) || "
    "(has(self.targetModules) && self.feedForwardModules.all(name, self.targetModules.exists(target, target == name)))",
    "every name of feedForwardModules must also stand in targetModules",
)


class Ia3Method(SpecModel):
    """Learned vectors that rescale activations of a frozen model (Liu et al. 2022, (IA)^3)."""

    model_config = ConfigDict(json_schema_extra=rules(_FEED_FORWARD_ARE_TARGETS))

    target_modules: _Modules | None = None
    """Names of the modules that are rescaled; absent is what PEFT knows for the architecture: keys, values and the feed-forward layer."""
    feed_forward_modules: _Modules | None = None
    """Those of targetModules whose inputs are rescaled, instead of their outputs."""

    @model_validator(mode="after")
    def _feed_forward_are_targets(self) -> Self:
        check(set(self.feed_forward_modules or ()) <= set(self.target_modules or ()), _FEED_FORWARD_ARE_TARGETS["message"])
        return self


class PromptTuningMethod(SpecModel):
    """Trained embeddings in front of every sequence (Lester et al. 2021)."""

    num_virtual_tokens: _VirtualTokens = 20
    """Number of trained embeddings; they take up room in the model's context."""
    init_text: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Text whose embeddings the training begins with, repeated or cut to numVirtualTokens; absent begins with random ones."""


class PrefixTuningMethod(SpecModel):
    """Trained keys and values in front of every layer's own (Li and Liang 2021)."""

    num_virtual_tokens: _VirtualTokens = 20
    """Number of trained positions; they take up room in the model's context."""
    projection_size: _Width | None = None
    """Width of an encoder that the keys and values come from while training; absent trains them directly."""


_LAYERS_GO_WITH_LSTM = rule(
    "self.encoder == 'lstm' || (self.encoderLayers == 2 && self.encoderDropout == 0.0)",
    "encoderLayers and encoderDropout go with the encoder lstm: the encoder mlp has two hidden layers and no dropout",
)


class PTuningMethod(SpecModel):
    """Trained embeddings in front of every sequence that come from a small encoder (Liu et al. 2021, P-tuning)."""

    model_config = ConfigDict(json_schema_extra=rules(_LAYERS_GO_WITH_LSTM))

    num_virtual_tokens: _VirtualTokens = 20
    """Number of trained embeddings; they take up room in the model's context."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Form of the encoder."""
    encoder_hidden_size: _Width = 128
    """Width of the encoder's hidden layers."""
    encoder_layers: Annotated[int, Field(ge=1, le=32)] = 2
    """Layers of the encoder lstm."""
    encoder_dropout: _ShareDropped = 0.0
    """Share of values that is dropped between the layers of the encoder lstm while training."""

    @model_validator(mode="after")
    def _layers_go_with_lstm(self) -> Self:
        plain = self.encoder_layers == 2 and self.encoder_dropout == 0
        check(self.encoder == "lstm" or plain, _LAYERS_GO_WITH_LSTM["message"])
        return self


METHODS = ("full", "freeze", "lora", "adapter", "ia3", "promptTuning", "prefixTuning", "pTuning")
"""The keys of the union."""
WHOLE_MODEL_METHODS = ("full", "freeze")
"""Those that change the model's own weights; the others put something beside frozen ones."""


class Method(SpecModel):
    """How the weights change: exactly one."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one(*METHODS)))

    full: FullMethod | None = None
    """Train every weight."""
    freeze: FreezeMethod | None = None
    """Train some layers or modules and freeze all others."""
    lora: LoraMethod | None = None
    """Train low-rank updates (LoRA)."""
    adapter: AdapterMethod | None = None
    """Train bottleneck layers that are put into the frozen model."""
    ia3: Ia3Method | None = None
    """Train vectors that rescale activations ((IA)^3)."""
    prompt_tuning: PromptTuningMethod | None = None
    """Train embeddings in front of every sequence."""
    prefix_tuning: PrefixTuningMethod | None = None
    """Train keys and values in front of every layer's own."""
    p_tuning: PTuningMethod | None = None
    """Train embeddings in front of every sequence through an encoder (P-tuning)."""

    @model_validator(mode="after")
    def _one_method(self) -> Self:
        check_exactly_one(self, *METHODS)
        return self

    @property
    def chosen(self) -> str:
        """The key that is set, as in `METHODS`."""
        return next(field.alias or name for name, field in type(self).model_fields.items() if getattr(self, name) is not None)
