"""The examples: where they are, in what form, and which of them are held out."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from finetune_api.fields import ColumnName, DataUri, SpecModel, SplitName, SubsetName, check, check_exactly_one, exactly_one, rule, rules
from finetune_api.preparation import Preparation
from finetune_api.sources import (
    SECRET_NEEDS_REMOTE,
    SPLIT_NEEDS_HUB,
    ConfigMapSource,
    DataSource,
    SecretReference,
    check_secret,
    check_split,
)


class HeldOutSource(SpecModel):
    """Data that is never trained on: a fraction held out of the training data, or data of its own."""

    model_config = ConfigDict(json_schema_extra=rules(exactly_one("fraction", "source", "configMap"), SECRET_NEEDS_REMOTE, SPLIT_NEEDS_HUB))

    fraction: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Share of the training examples that is held out, chosen by training.seed."""
    source: DataUri | None = None
    """Where the data is; as in train."""
    config_map: ConfigMapSource | None = None
    """Data that stands in a ConfigMap."""
    split: SplitName | None = None
    """Split of a hub data set; as in train."""
    subset: SubsetName | None = None
    """Subset of a hub data set; as in train."""
    secret_ref: SecretReference | None = None
    """Secret for the source; as in train."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        check_exactly_one(self, "fraction", "source", "configMap")
        check_secret(self.secret_ref, self.source)
        check_split(self.split, self.subset, self.source)
        return self

    def data_source(self) -> DataSource | None:
        """The data of its own, or None where a fraction of the training data is held out."""
        if self.fraction is not None:
            return None
        return DataSource.model_construct(
            source=self.source, config_map=self.config_map, split=self.split, subset=self.subset, secret_ref=self.secret_ref
        )


_FIELDS: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "promptCompletion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"prompt", "chosen", "rejected"}),
}
"""The fields of a row of each form."""

_COLUMNS_FIT_FORMAT = rule(
    "self.format == 'auto' || self.columns.all(key, "
    "self.format == 'promptCompletion' ? key in ['prompt', 'completion'] : "
    "self.format == 'preference' ? key in ['prompt', 'chosen', 'rejected'] : key == self.format)",
    "columns may only rename fields of data.format",
)


_SOMETHING_TO_TRAIN_ON = rule(
    "has(self.train) || has(self.preparation.contentPoints) || has(self.preparation.questions)",
    "one of train, preparation.contentPoints, preparation.questions must be set: there is nothing to train on",
)


_SOMETHING_IS_LEFT = rule(
    "!has(self.validation.fraction) || !has(self.test) || !has(self.test.fraction) || self.validation.fraction + self.test.fraction < 1.0",
    "the fractions of validation and test leave nothing to train on",
)


_MADE_EXAMPLES_ARE_ANSWERED = rule(
    "self.format != 'text' || (!has(self.preparation.contentPoints) && !has(self.preparation.questions))",
    "preparation.contentPoints and preparation.questions make prompts with answers: use format auto, promptCompletion or messages",
)


class Data(SpecModel):
    """The examples: to train on, to validate while training, to test before and after."""

    model_config = ConfigDict(
        json_schema_extra=rules(_COLUMNS_FIT_FORMAT, _SOMETHING_TO_TRAIN_ON, _SOMETHING_IS_LEFT, _MADE_EXAMPLES_ARE_ANSWERED)
    )

    train: DataSource | None = None
    """Examples to train on. What preparation.contentPoints and preparation.questions make is added to them; with one of those it may
    be absent."""
    validation: HeldOutSource = HeldOutSource(fraction=0.1)
    """Examples that are never trained on; their loss is measured before, during and after the training."""
    test: HeldOutSource | None = None
    """Examples that are only used for the comparison of the untuned and the tuned model."""
    group_by: ColumnName | None = None
    """Column of the data; rows that hold the same in it are never on two sides of a split. Where validation or test is data of its own
    and shares a value with the training data, what follows is what preparation.leakage says."""
    format: Literal["auto", "messages", "promptCompletion", "text", "preference"] = "auto"
    """Form of a row: messages (a conversation, written with the model's chat template), promptCompletion, text, or preference (prompt,
    chosen and rejected, each a text or messages). auto looks at the columns."""
    columns: Annotated[
        dict[Literal["messages", "prompt", "completion", "text", "chosen", "rejected"], ColumnName], Field(max_length=6)
    ] = {}
    """Names of the data's own columns, by the field that they hold: {prompt: question, completion: answer}."""
    preparation: Preparation = Preparation()
    """Checks of the examples, and examples that are made."""

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Self:
        if self.format != "auto":
            check(set(self.columns) <= _FIELDS[self.format], _COLUMNS_FIT_FORMAT["message"])
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> Self:
        check(self.train is not None or self.preparation.makes_examples, _SOMETHING_TO_TRAIN_ON["message"])
        held_out = (self.validation.fraction or 0.0) + ((self.test and self.test.fraction) or 0.0)
        check(held_out < 1, _SOMETHING_IS_LEFT["message"])
        check(self.format != "text" or not self.preparation.makes_examples, _MADE_EXAMPLES_ARE_ANSWERED["message"])
        return self

    def sources(self) -> dict[str, DataSource]:
        """The data of each split (train, validation, test) that has data of its own."""
        held_out = {name: held.data_source() for name, held in (("validation", self.validation), ("test", self.test)) if held}
        return {name: source for name, source in {"train": self.train, **held_out}.items() if source is not None}
