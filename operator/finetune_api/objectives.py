"""What is minimised: one model for each objective, and the union of them by presence."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from finetune_api.fields import (
    ModelUri,
    Revision,
    SpecModel,
    check,
    check_distinct,
    check_exactly_one,
    exactly_one,
    rule,
    rules,
)
from finetune_api.sources import (
    REVISION_NEEDS_HUB,
    SECRET_NEEDS_REMOTE,
    Endpoint,
    ModelSource,
    SecretReference,
    check_revision,
    check_secret,
)

LossOn = Literal["completion", "assistant", "all"]


class SftObjective(SpecModel):
    """Supervised fine-tuning: the cross-entropy of the next token."""

    loss_on: LossOn = "completion"
    """Tokens that count: the completion (of a conversation, its last assistant turn), every assistant turn, or all."""


class Teacher(SpecModel):
    """The model that is learned from: its files, or an endpoint that serves it. Exactly one of source and endpoint."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            exactly_one("source", "endpoint"),
            REVISION_NEEDS_HUB,
            SECRET_NEEDS_REMOTE,
        )
    )

    source: ModelUri | None = None
    """Where the model is: hf://owner/name, pvc://claim/path or s3://bucket/path. Local runs also take file://path."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub model."""
    secret_ref: SecretReference | None = None
    """Secret with the key `token` (hub), or `accessKeyId`, `secretAccessKey` and optionally `endpoint`, `region` (s3)."""
    endpoint: Endpoint | None = None
    """A served model; only what it says can be learned, with the form response."""

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        check_exactly_one(self, "source", "endpoint")
        check_revision(self.revision, self.source)
        check_secret(self.secret_ref, self.source)
        return self

    def model_source(self) -> ModelSource | None:
        """The teacher's files as a model to load, or None where an endpoint serves it."""
        if self.source is None:
            return None
        return ModelSource.model_construct(source=self.source, revision=self.revision, secret_ref=self.secret_ref)


_Weight = Annotated[float, Field(gt=0, le=1000)]
_PartWeight = Annotated[float, Field(ge=0, le=1000)]


class ResponseForm(SpecModel):
    """The student's distribution of the next token is drawn to the teacher's (Hinton et al. 2015)."""

    weight: _Weight = 1.0
    """Weight of this form in the loss."""
    divergence: Literal["forwardKL", "reverseKL", "jensenShannon"] = "forwardKL"
    """Distance of the two distributions: KL(teacher, student), KL(student, teacher), or the mean of both to their middle."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Both models' logits are divided by this, and the loss is multiplied by its square."""
    top_k: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Compute the teacher's logits once, keep the k largest of each place on output.storage, and train from those; absent runs the
    teacher beside the student and compares whole distributions."""


_LayerNumber = Annotated[int, Field(ge=-1024, le=1024)]


class LayerPair(SpecModel):
    """A layer of the student and the teacher's layer that it learns from."""

    student: _LayerNumber
    """The student's layer: 0 is the embeddings, n the output of the n-th layer, -1 that of the last."""
    teacher: _LayerNumber
    """The teacher's layer, counted in the same way."""


class FeatureForm(SpecModel):
    """The student's hidden states are drawn to the teacher's (Romero et al. 2015); where widths differ, through a learned projection."""

    weight: _Weight = 1.0
    """Weight of this form in the loss."""
    layers: Annotated[tuple[LayerPair, ...], Field(max_length=64)] = ()
    """Layers that are compared; empty is the last of each."""
    attention: bool = False
    """Compare the attention maps of the same layers too."""


_SOME_PART_WEIGHS = rule(
    "self.distanceWeight > 0.0 || self.angleWeight > 0.0 || self.similarityWeight > 0.0",
    "one of distanceWeight, angleWeight, similarityWeight must be larger than 0",
)


class RelationForm(SpecModel):
    """Relations among the student's hidden states are drawn to those among the teacher's (Park et al. 2019; Tung and Mori 2019)."""

    model_config = ConfigDict(json_schema_extra=rules(_SOME_PART_WEIGHS))

    weight: _Weight = 1.0
    """Weight of this form in the loss."""
    between: Annotated[
        tuple[Literal["tokens", "examples"], ...],
        Field(min_length=1, max_length=2, json_schema_extra={"x-kubernetes-list-type": "set"}),
        AfterValidator(check_distinct),
    ] = ("tokens",)
    """tokens: among the tokens of an example; examples: among the examples of a packed row."""
    distance_weight: _PartWeight = 1.0
    """Weight of the distances between two."""
    angle_weight: _PartWeight = 2.0
    """Weight of the angles among three."""
    similarity_weight: _PartWeight = 1.0
    """Weight of the matrix of cosine similarities."""

    @model_validator(mode="after")
    def _some_part_weighs(self) -> Self:
        check(max(self.distance_weight, self.angle_weight, self.similarity_weight) > 0, _SOME_PART_WEIGHS["message"])
        return self


_SOME_FORM = rule(
    "has(self.response) || has(self.feature) || has(self.relation)",
    "at least one of response, feature, relation must be set",
)
_ENDPOINT_GIVES_RESPONSES = rule(
    "!has(self.teacher.endpoint) || (!has(self.feature) && !has(self.relation) && "
    "(!has(self.response) || (!has(self.response.topK) && self.response.divergence == 'forwardKL' && self.response.temperature == 1.0)))",
    "an endpoint gives responses alone: leave out feature, relation and response.topK, and let response.divergence be forwardKL "
    "and response.temperature 1",
)


class DistillationObjective(SpecModel):
    """The model becomes like a teacher, in one or more forms, each with its weight; their sum and that of the labels is minimised."""

    model_config = ConfigDict(json_schema_extra=rules(_SOME_FORM, _ENDPOINT_GIVES_RESPONSES))

    teacher: Teacher
    """The model that is learned from."""
    loss_on: LossOn = "completion"
    """Tokens that count: the completion (of a conversation, its last assistant turn), every assistant turn, or all."""
    label_weight: Annotated[float, Field(ge=0, le=1000)] = 0.5
    """Weight of the cross-entropy of the data's own labels."""
    response: ResponseForm | None = None
    """Learn the teacher's distribution of the next token."""
    feature: FeatureForm | None = None
    """Learn the teacher's hidden states."""
    relation: RelationForm | None = None
    """Learn the relations among the teacher's hidden states."""

    @model_validator(mode="after")
    def _forms_fit_teacher(self) -> Self:
        check(any((self.response, self.feature, self.relation)), _SOME_FORM["message"])
        if self.teacher.endpoint is not None:
            form = self.response
            plain = form is None or (form.top_k is None and form.divergence == "forwardKL" and form.temperature == 1)
            check(plain and not self.feature and not self.relation, _ENDPOINT_GIVES_RESPONSES["message"])
        return self


class DpoObjective(SpecModel):
    """Direct preference optimisation: a chosen answer becomes more probable against a rejected one (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """How strongly the model is held to what it was before the training."""
    label_smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round."""


OBJECTIVES = ("sft", "distillation", "dpo")
"""The keys of the union."""


class Objective(SpecModel):
    """What is minimised: exactly one."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one(*OBJECTIVES)))

    sft: SftObjective | None = None
    """Supervised fine-tuning."""
    distillation: DistillationObjective | None = None
    """Learn from a teacher."""
    dpo: DpoObjective | None = None
    """Learn from preferences."""

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        check_exactly_one(self, *OBJECTIVES)
        return self

    @property
    def chosen(self) -> str:
        """The key that is set, as in `OBJECTIVES`."""
        return next(field.alias or name for name, field in type(self).model_fields.items() if getattr(self, name) is not None)
