"""What is done to the examples before the training: checks, and examples that are made from documents."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from finetune_api.fields import ColumnName, DataUri, SpecModel, Template, check, check_exactly_one, exactly_one, rule, rules
from finetune_api.sources import (
    SECRET_NEEDS_REMOTE,
    ConfigMapSource,
    DataSource,
    Endpoint,
    ModelReference,
    SecretReference,
    check_secret,
)

_OVERLAP_IS_SMALLER = rule("self.overlapWords < self.passageWords", "overlapWords must be smaller than passageWords")


class KnowledgeBase(SpecModel):
    """Documents that texts are grounded in, cut into passages: txt, md, html or jsonl. Exactly one of source and configMap."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("source", "configMap"), SECRET_NEEDS_REMOTE, _OVERLAP_IS_SMALLER))

    source: DataUri | None = None
    """A file, or a folder of them: pvc://claim/path, s3://bucket/path or hf://datasets/owner/name/path. Local runs also take file://path."""
    config_map: ConfigMapSource | None = None
    """A document that stands in a ConfigMap."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""
    passage_words: Annotated[int, Field(ge=8, le=4096)] = 120
    """Words of a passage at most."""
    overlap_words: Annotated[int, Field(ge=0, le=2048)] = 20
    """Last words of a passage that the next one of the document begins with."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "source", "configMap")
        check_secret(self.secret_ref, self.source)
        check(self.overlap_words < self.passage_words, _OVERLAP_IS_SMALLER["message"])
        return self

    def data_source(self) -> DataSource:
        """Where the documents are, as data to read."""
        return DataSource.model_construct(source=self.source, config_map=self.config_map, secret_ref=self.secret_ref)


class GoldenOutputs(DataSource):
    """Outputs as they should be, one a row. Exactly one of source and configMap."""

    column: ColumnName = "text"
    """Column that holds the output."""
    prompt_column: ColumnName | None = None
    """Column that holds the request which the output answers; {prompt} in contentPoints.prompt stands for it."""


_ENCODER_GOES_WITH_KIND = rule(
    "has(self.encoder) == (self.kind != 'bm25')", "encoder goes with the kinds embedding and hybrid, which need it"
)


class Retriever(SpecModel):
    """How passages are found: by words (bm25), by meaning (embedding), or by both (hybrid)."""

    model_config = ConfigDict(json_schema_extra=rules(_ENCODER_GOES_WITH_KIND))

    kind: Literal["bm25", "embedding", "hybrid"] = "bm25"
    """bm25 compares words (Robertson and Zaragoza 2009), embedding an encoder's vectors, hybrid ranks by both (Cormack et al. 2009)."""
    passages: Annotated[int, Field(ge=1, le=64)] = 4
    """Passages that are taken, the best first."""
    encoder: ModelReference | None = None
    """Encoder of transformers or sentence-transformers, whose token vectors are averaged."""

    @model_validator(mode="after")
    def _encoder_goes_with_kind(self) -> Self:
        check((self.encoder is not None) == (self.kind != "bm25"), _ENCODER_GOES_WITH_KIND["message"])
        return self


TEXT_ALONE = rule("!has(self.endpoint) || self.endpoint.topLogprobs == 0", "endpoint.topLogprobs is for a teacher: text alone is used")


class Generator(SpecModel):
    """The model that writes: its files, or an endpoint that serves it. Exactly one of model and endpoint."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("model", "endpoint"), TEXT_ALONE))

    model: ModelReference | None = None
    """A model's files, which the job's own workers generate with."""
    endpoint: Endpoint | None = None
    """A served model; no worker is asked for."""

    @model_validator(mode="after")
    def _one_generator(self) -> Self:
        check_exactly_one(self, "model", "endpoint")
        check(self.endpoint is None or self.endpoint.top_logprobs == 0, TEXT_ALONE["message"])
        return self


_Share = Annotated[float, Field(ge=0, le=1)]
_NewTokens = Annotated[int, Field(ge=1, le=8192)]

_POINTS_INSTRUCTION = (
    "Write the key content points of the text below, one a line, each beginning with '- '. "
    "Use only facts that the passages hold, and no words of praise or introduction.\n\n"
    "Passages:\n{passages}\n\nText:\n{output}\n\nContent points:\n"
)
_POINTS_PROMPT = "Write a text that makes these points:\n{points}"
_QUESTIONS_INSTRUCTION = (
    "Write {count} questions that the passage below answers, each with its answer in the passage's own words. "
    "Write each as two lines, 'Question: ...' and 'Answer: ...', and nothing else.\n\nPassage:\n{passages}\n"
)

_POINTS_FROM_BOTH = rule(
    "self.instruction.contains('{passages}') && self.instruction.contains('{output}')", "instruction must hold {passages} and {output}"
)
_PROMPT_MAKES_POINTS = rule("self.prompt.contains('{points}')", "prompt must hold {points}")
_PROMPT_NEEDS_COLUMN = rule(
    "!self.prompt.contains('{prompt}') || has(self.goldenOutputs.promptColumn)",
    "{prompt} in prompt stands for the rows' own requests: set goldenOutputs.promptColumn",
)


class ContentPoints(SpecModel):
    """Examples made of golden outputs: what an output says, grounded in a knowledge base, becomes the prompt for it."""

    model_config = ConfigDict(json_schema_extra=rules(_POINTS_FROM_BOTH, _PROMPT_MAKES_POINTS, _PROMPT_NEEDS_COLUMN))

    knowledge_base: KnowledgeBase
    """Documents that the points must agree with."""
    golden_outputs: GoldenOutputs
    """The outputs, which become completions."""
    retriever: Retriever = Retriever()
    """How the passages for an output are found."""
    generator: Generator | None = None
    """Who writes the points; absent is the job's base model."""
    instruction: Template = _POINTS_INSTRUCTION
    """What the generator is told; {passages} stands for the passages that were found, {output} for the golden output."""
    prompt: Template = _POINTS_PROMPT
    """The prompt of the example that is made; {points} stands for the points, {prompt} for the row's own request."""
    min_support: _Share = 0.5
    """Share of a point's content words that one passage must hold; other points are dropped, and an output without points is left out."""
    max_new_tokens: _NewTokens = 256
    """Tokens that the generator writes at most."""

    @model_validator(mode="after")
    def _templates_are_whole(self) -> Self:
        check(all(word in self.instruction for word in ("{passages}", "{output}")), _POINTS_FROM_BOTH["message"])
        check("{points}" in self.prompt, _PROMPT_MAKES_POINTS["message"])
        check("{prompt}" not in self.prompt or self.golden_outputs.prompt_column is not None, _PROMPT_NEEDS_COLUMN["message"])
        return self


_QUESTIONS_FROM_PASSAGE = rule("self.instruction.contains('{passages}')", "instruction must hold {passages}")


class Questions(SpecModel):
    """Examples made of documents: questions that a passage answers, with the answers."""

    model_config = ConfigDict(json_schema_extra=rules(_QUESTIONS_FROM_PASSAGE))

    knowledge_base: KnowledgeBase
    """Documents that are asked about."""
    generator: Generator | None = None
    """Who writes the questions and answers; absent is the job's base model."""
    per_passage: Annotated[int, Field(ge=1, le=32)] = 2
    """Questions that are asked for with each passage."""
    limit: Annotated[int, Field(ge=1, le=1000000)] = 1000
    """Examples that are made at most."""
    instruction: Template = _QUESTIONS_INSTRUCTION
    """What the generator is told; {passages} stands for the passage, {count} for perPassage."""
    min_support: _Share = 0.5
    """Share of an answer's content words that the passage must hold; other pairs are dropped."""
    max_new_tokens: _NewTokens = 256
    """Tokens that the generator writes at most."""

    @model_validator(mode="after")
    def _template_is_whole(self) -> Self:
        check("{passages}" in self.instruction, _QUESTIONS_FROM_PASSAGE["message"])
        return self


class Preparation(SpecModel):
    """Checks of the examples before any worker is asked for, and examples that are made."""

    deduplicate: Literal["none", "exact", "near"] = "none"
    """Leave out all but the first of the same examples (exact), or of almost the same (near, by MinHash, Broder 1997)."""
    leakage: Literal["ignore", "warn", "drop", "fail"] = "warn"
    """What follows when a training example's words also stand in validation or test data or a suite: nothing, a warning, the training
    example is left out, or the job fails."""
    max_rejected_fraction: _Share = 0.0
    """Share of rows that may be unusable; they are left out and written to output.storage with file, line and reason. With more, and
    with any where it is 0, the job fails."""
    content_points: ContentPoints | None = None
    """Make examples of golden outputs and a knowledge base."""
    questions: Questions | None = None
    """Make questions and answers of a knowledge base."""

    @property
    def makes_examples(self) -> bool:
        """Whether there will be more examples than the data holds."""
        return self.content_points is not None or self.questions is not None
