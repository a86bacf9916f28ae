"""What the untuned model reaches by its prompt alone, before anything is trained."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import (
    BY_NAME,
    MetricName,
    ShortName,
    SpecModel,
    check,
    check_exactly_one,
    check_names_distinct,
    exactly_one,
    rule,
    rules,
)
from finetune_api.preparation import KnowledgeBase, Retriever
from finetune_api.sources import ModelReference


class PromptRetrieval(SpecModel):
    """Passages of a knowledge base in the prompt (Lewis et al. 2020, RAG)."""

    knowledge_base: KnowledgeBase
    """Documents that the passages are from."""
    retriever: Retriever = Retriever()
    """How the passages for a prompt are found."""


_SELECTION_NEEDS_EXAMPLES = rule("self.selection == 'random' || has(self.examples)", "selection goes with examples")


class PromptStrategy(SpecModel):
    """One way to ask the untuned model. With a name alone the model is asked as the tuned one will be; what is set is put together."""

    model_config = ConfigDict(json_schema_extra=rules(_SELECTION_NEEDS_EXAMPLES))

    name: ShortName
    """Name of the strategy in status and results."""
    examples: Annotated[int, Field(ge=1, le=64)] | None = None
    """Training examples that are shown before the question; absent shows none."""
    selection: Literal["random", "similar"] = "random"
    """Which examples are shown: the same random ones for all questions, or those whose prompts are most similar to the question."""
    system: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """System prompt."""
    retrieval: PromptRetrieval | None = None
    """Put passages of a knowledge base before the question."""

    @model_validator(mode="after")
    def _selection_needs_examples(self) -> Self:
        check(self.selection == "random" or self.examples is not None, _SELECTION_NEEDS_EXAMPLES["message"])
        return self


class BaselineModel(ModelReference):
    """Another untuned model, which is asked in the same ways."""

    name: ShortName
    """Name of the model in status and results."""


class Sufficient(SpecModel):
    """The goal that makes the training superfluous. Exactly one of atLeast and atMost."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("atLeast", "atMost")))

    metric: MetricName
    """Metric of a suite, as suite/metric."""
    at_least: float | None = None
    """Reached when the best prompt's value is not smaller."""
    at_most: float | None = None
    """Reached when the best prompt's value is not larger."""

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        check_exactly_one(self, "atLeast", "atMost")
        return self


_SOMETHING_TO_ASK = rule("self.prompts.size() > 0 || self.models.size() > 0", "at least one of prompts, models must be set")
_SUFFICIENT_NEEDS_PROMPTS = rule("!has(self.sufficientIf) || self.prompts.size() > 0", "sufficientIf needs prompts that may reach it")


class BaselinePlan(SpecModel):
    """Prompts for the untuned model, measured on every suite before the training."""

    model_config = ConfigDict(json_schema_extra=rules(_SOMETHING_TO_ASK, _SUFFICIENT_NEEDS_PROMPTS))

    prompts: Annotated[
        tuple[PromptStrategy, ...], Field(max_length=8, json_schema_extra=BY_NAME), AfterValidator(check_names_distinct)
    ] = ()
    """Ways to ask the untuned model."""
    models: Annotated[tuple[BaselineModel, ...], Field(max_length=4, json_schema_extra=BY_NAME), AfterValidator(check_names_distinct)] = ()
    """Other untuned models to stand beside the base model."""
    metric: MetricName | None = None
    """Metric that the best is chosen by, as suite/metric; absent is the first of the suites' metrics that judges generated text, else the
    first of all."""
    sufficient_if: Sufficient | None = None
    """When the best prompt for the base model reaches this, the job is complete and trains nothing."""

    @model_validator(mode="after")
    def _something_to_ask(self) -> Self:
        check(bool(self.prompts or self.models), _SOMETHING_TO_ASK["message"])
        check(self.sufficient_if is None or bool(self.prompts), _SUFFICIENT_NEEDS_PROMPTS["message"])
        return self
