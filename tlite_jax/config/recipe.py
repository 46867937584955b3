"""The schema of a recipe: what is made, from which model, in which stages, and what of it is released."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tlite_jax.config.base import NonNegative, Positive, Section

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Dtype = Literal["bfloat16", "float16", "float32"]


class FetchConfig(Section):
    """A command that brings what the recipe starts from."""

    name: Name
    command: Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="words behind `python -m launch`")
    makes: Annotated[tuple[Path, ...], Field(min_length=1)] = Field(description="files and directories it leaves")


class BaseConfig(Section):
    """The model that is adapted; it is imported where the first stage's init_from.path says."""

    source: str = Field(min_length=1, description="a Hugging Face directory, a hub id or a GGUF file")
    revision: str | None = Field(default=None, description="of a hub id")


class StageConfig(Section):
    """A training run; its buckets are prepared first if its config says how."""

    config: Path
    overrides: tuple[str, ...] = Field(default=(), description="section.field=value")


class TasksConfig(Section):
    """An evaluation of the last stage: lm-evaluation-harness's tasks, MERA, or else bits per byte of held-out text."""

    name: Name
    tasks: str | None = Field(default=None, description="with commas")
    mera: str | None = Field(default=None, description="directory of its dataset, hub, or hub@REVISION")
    mera_split: Literal["test", "train", "validation"] = "test"
    num_fewshot: NonNegative | None = None
    limit: Positive | None = Field(default=None, description="documents of each task; null: all")
    include_path: Path | None = None
    max_tokens: Positive | None = Field(default=None, description="of bits per byte: tokens of a bucket; null: all")
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.tasks is not None and self.mera is not None:
            raise ValueError("give tasks or mera, and the other in an entry of its own")
        if self.tasks is None and (self.num_fewshot is not None or self.include_path is not None):
            raise ValueError("num_fewshot and include_path are for tasks")
        if self.max_tokens is not None and (self.tasks is not None or self.mera is not None):
            raise ValueError("max_tokens is for bits per byte: leave it out beside tasks and mera")
        return self


class ExportConfig(Section):
    """The files of the release."""

    dtype: Dtype | None = Field(default=None, description="of the HF weights; null: what the base was stored in")
    max_shard_size: str = "5GB"
    types: tuple[str, ...] = Field(default=(), description="GGUF types, e.g. F16, Q4_K_M; none: no GGUF files")

    @model_validator(mode="after")
    def _types_differ(self) -> Self:
        if repeated := sorted({kind for kind in self.types if self.types.count(kind) > 1}):
            raise ValueError(f"types must differ; repeated: {', '.join(repeated)}")
        return self


class GateConfig(Section):
    """What is checked before anything is called a release."""

    sample: Path | None = Field(default=None, description="UTF-8 text for the table of quantisations; null: our own")
    windows: Positive = Field(default=16, description="most windows of it")
    dtype: Literal["float32", "bfloat16"] = "float32"
    allow_missing: tuple[Literal["torch", "base", "hf", "gguf"], ...] = ()
    most_kl: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="GGUF type -> most mean KL that its file may have, nats a token"
    )


class CardConfig(Section):
    """What only the publisher knows."""

    license: str | None = Field(default=None, description="the hub's identifier, e.g. apache-2.0")
    base_model: str | None = Field(default=None, description="hub id of the model that was adapted")
    languages: tuple[str, ...] = Field(default=(), description="codes, e.g. ru")
    datasets: tuple[str, ...] = Field(default=(), description="hub ids of data sets")
    tags: tuple[str, ...] = ()
    description: str | None = Field(default=None, description="a paragraph for the top of the card")
    limitations: tuple[str, ...] = Field(default=(), description="a line each")


class RecipeConfig(Section):
    """From raw text to a gated release."""

    name: Name = Field(description="of the model: NAME.TYPE.gguf")
    output: Path = Field(description="directory of recipe.json, logs and results; the release is OUTPUT/release")
    fetch: tuple[FetchConfig, ...] = ()
    base: BaseConfig | None = Field(default=None, description="null: it lies where the first stage looks for it")
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    evaluate: tuple[TasksConfig, ...] = ()
    export: ExportConfig = ExportConfig()
    gate: GateConfig = GateConfig()
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _limits_are_of_exports(self) -> Self:
        if strange := sorted(set(self.gate.most_kl) - set(self.export.types)):
            raise ValueError(f"gate.most_kl: {strange[0]} is none of export.types; add it there, or leave it out here")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for what, names in {
            "fetch": [part.name for part in self.fetch],
            "evaluate": [part.name for part in self.evaluate],
        }.items():
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{what}: names must differ; repeated: {', '.join(repeated)}")
        return self
