"""The schema of labellers: what gives documents labels that no field of theirs holds."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tlite_jax.config.base import Fraction, Positive, Section


class _Labeller(Section):
    """What all kinds share."""

    replace: bool = Field(default=False, description="also label documents that have the label already")
    sources: tuple[str, ...] | None = Field(default=None, description="of these sources only; null: of all")


class LanguageLabellerConfig(_Labeller):
    """Language identification (py3langid), offline."""

    kind: Literal["language"]
    label: str = "language"
    languages: tuple[str, ...] | None = Field(default=None, description="ISO 639-1 codes to choose from; null: all 97")
    min_confidence: Fraction = Field(default=0.5, description="below it the label is unknown")
    max_characters: Positive = Field(default=2000, description="of a document are looked at")


class ClassifierLabellerConfig(_Labeller):
    """A model that `python -m launch label train` made."""

    kind: Literal["classifier"]
    path: Path
    min_confidence: Fraction = Field(default=0.0, description="below it the label is unknown")


class ColumnLabellerConfig(_Labeller):
    """Values that someone else computed, in a column of files, joined by a document's id or by its text's hash."""

    kind: Literal["column"]
    label: str
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="parquet or jsonl; files or patterns")
    column: str = Field(description="a string, or a number when there are thresholds")
    key_column: str = Field(default="id", description="holds the document's id or hash")
    key: Literal["id", "hash"] = Field(
        default="id", description="id: the source's id_field; hash: BLAKE2b-128 of the text in UTF-8, hexadecimal"
    )
    thresholds: dict[str, float] | None = Field(
        default=None, description="label's value -> the least number that has it, e.g. {high: 0.8, mid: 0.4, low: 0}"
    )
    missing: Literal["unknown", "quarantine"] = Field(
        default="unknown", description="a document without a value is labelled so, or left out"
    )


class PythonLabellerConfig(_Labeller):
    """A class of the user's: docs/labels.md says what it must have."""

    kind: Literal["python"]
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class")
    options: dict[str, str | int | float | bool] = Field(default={}, description="its constructor's arguments")


LabellerConfig = Annotated[
    LanguageLabellerConfig | ClassifierLabellerConfig | ColumnLabellerConfig | PythonLabellerConfig,
    Field(discriminator="kind"),
]


class ChatConfig(Section):
    """Documents that are conversations, rendered with the tokenizer's chat template; the answers are scored."""

    messages_field: str | None = Field(default=None, description="a list of {role, content}")
    prompt_field: str | None = Field(default=None, description="or two fields: a question")
    response_field: str | None = Field(default=None, description="and its answer")
    template: Literal["tokenizer", "none"] = Field(
        default="tokenizer", description="none: prompt and response as they are, one after the other"
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        pair = (self.prompt_field, self.response_field)
        if (self.messages_field is None) == (None in pair) or (self.messages_field is not None and any(pair)):
            raise ValueError("give messages_field, or both prompt_field and response_field")
        if self.messages_field is not None and self.template == "none":
            raise ValueError("template none: a conversation has none; give prompt_field and response_field")
        return self
