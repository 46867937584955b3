"""The schema of documents -> buckets: sources, labels, what is set aside and what is removed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tlite_jax.config.base import Fraction, NonNegative, Positive, Rate, Section
from tlite_jax.config.labels import ChatConfig, LabellerConfig


class SourceConfig(Section):
    """One set of files of documents, with the labels its documents carry."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="files or glob patterns")
    format: Literal["auto", "jsonl", "parquet", "text"] = Field(
        default="auto",
        description="auto: by suffix; jsonl may be compressed as .zst or .gz; text is one document a file",
    )
    text_field: str = "text"
    id_field: str | None = Field(default=None, description="holds a document's id, by which columns of labels join")
    chat: ChatConfig | None = Field(default=None, description="documents are conversations; text_field is not read")
    labels: dict[str, str] = Field(default={}, description="labels of every document, e.g. language: ru")
    label_fields: dict[str, str] = Field(default={}, description="label -> the document field that holds it")
    packing: Literal["concatenate", "best_fit"] = Field(
        default="concatenate",
        description="concatenate: documents one after another, cut into rows; best_fit: whole documents into rows, for "
        "instructions",
    )
    training: bool = Field(default=True, description="false: all of it is held out, none is ever trained on")
    parse_special_tokens: bool = Field(
        default=False, description="true: special tokens written in the text become their ids (chat templates)"
    )


class HeldOutConfig(Section):
    """Documents set aside for evaluation before anything is counted."""

    fraction: Rate = Field(description="share of each bucket's documents")
    max_documents: NonNegative | None = Field(default=None, description="per bucket that is trained on; null: no limit")
    seed: NonNegative = Field(default=0, description="another seed sets other documents aside")


class NearDuplicatesConfig(Section):
    """MinHash near-duplicate removal; the first document of a group stays."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    num_permutations: Positive = 128
    ngram_words: Positive = 5


class EvaluationSetConfig(Section):
    """Items of an evaluation that must not be trained on."""

    name: Annotated[str, Field(min_length=1)]
    paths: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="files, patterns or URLs")
    format: Literal["auto", "jsonl", "parquet", "text"] = Field(default="auto", description="as of a source")
    text_fields: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=("text",), description="each is looked for by itself, e.g. [question, answer]"
    )


class DecontaminationConfig(Section):
    """Removal of what repeats evaluation items word for word; case, punctuation and ё aside."""

    sets: Annotated[tuple[EvaluationSetConfig, ...], Field(min_length=1)]
    ngram_words: Annotated[int, Field(ge=4, le=50)] = Field(default=13, description="words in a row that tell a copy")
    min_words: Annotated[int, Field(ge=4, le=50)] = Field(
        default=8, description="an item shorter than ngram_words is looked for whole, down to this many words"
    )
    drop_above: Fraction = Field(
        default=0.0,
        description="a document with a larger share of its words copied is dropped, else they are cut out of it",
    )

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.min_words > self.ngram_words:
            raise ValueError(f"min_words {self.min_words} is above ngram_words {self.ngram_words}; lower it")
        names = [found.name for found in self.sets]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names of sets must differ; repeated: {', '.join(repeated)}")
        return self


class PrepareConfig(Section):
    """Documents -> buckets of token rows."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    bucket_labels: tuple[str, ...] = ("source", "language", "style", "topic", "domain")
    labellers: tuple[LabellerConfig, ...] = Field(default=(), description="run in this order on every document")
    held_out: HeldOutConfig
    near_duplicates: NearDuplicatesConfig | None = None
    decontaminate: DecontaminationConfig | None = None
    max_document_characters: Positive = 10_000_000
    max_quarantine_rate: Fraction = Field(default=0.01, description="above this share of bad documents it stops")
    num_workers: Positive | None = Field(default=None, description="null: one per core")
    shard_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=32 << 20, description="input of one task, as stored; changes no byte of the buckets"
    )

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source names must differ; repeated: {', '.join(repeated)}")
        return self
