"""The schema of a run: one frozen, strict value that describes it completely.

A config is read from YAML, overridden by dotted `section.field=value` words and validated once. Two hashes name it:
the *semantic* one (what is learned: model, data, optimizer) guards resume; the *execution* one (where and how it is
computed: mesh, precision, kernels) may change when a run resumes.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tlite_jax.config.base import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Rate,
    Section,
    digest,
)
from tlite_jax.config.evaluation import EvaluationConfig
from tlite_jax.config.mixture import DeclaredBucket, MixtureConfig
from tlite_jax.config.prepare import PrepareConfig
from tlite_jax.config.spikes import SpikesConfig
from tlite_jax.config.trackers import MlflowConfig, WandbConfig
from tlite_jax.config.watchdog import WatchdogConfig


class Llama3RopeScaling(Section):
    """The frequency-dependent scaling of Llama 3.1 (`rope_type: llama3` in Hugging Face configs)."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: Positive

    @model_validator(mode="after")
    def _bands_are_ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be greater than low_freq_factor")
        return self


class ModelConfig(Section):
    """A Llama-family decoder; the names are those of Hugging Face's `LlamaConfig`."""

    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    max_position_embeddings: Positive
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool
    attention_bias: bool = False
    initializer_range: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs")
        return self


class InitConfig(Section):
    """Where the first weights come from, and what comes with them."""

    path: Path = Field(description="a run or an imported checkpoint")
    step: NonNegative | None = Field(default=None, description="null: the newest")
    optimizer: Literal["reset", "carry"] = Field(description="Adam's moments and their step count")
    schedule: Literal["reset", "carry"] = Field(
        description="reset: this run's schedule starts at its first step; carry: it goes on from the source's step"
    )


def _no_number(value: Any) -> Any:
    """1 equals True, and is not what anyone means."""
    if type(value) in (int, float):
        raise ValueError("should be false, true or best_fit")
    return value


class DataConfig(Section):
    """Tokens: how text becomes rows, where the rows lie, and in which proportions they are read."""

    buckets: Path
    tokenizer: Path | None = Field(default=None, description="a Hugging Face directory; null: that of init_from")
    sequence_length: Positive
    document_start: str | None = Field(default="bos", description="bos, eos, a token's text, or null for none")
    document_end: str | None = Field(default="eos", description="bos, eos, a token's text, or null for none")
    document_masking: Annotated[Literal[False, True, "best_fit"], BeforeValidator(_no_number)] = Field(
        default=False, description="attention stays inside a document; best_fit: only in rows packed so"
    )
    prepare: PrepareConfig | None = Field(default=None, description="null: the buckets are there already")
    mixture: MixtureConfig = MixtureConfig()
    declared: tuple[DeclaredBucket, ...] = Field(
        default=(), description="sizes of buckets that are not prepared yet, for `mixture`; training reads real ones"
    )

    @property
    def has_segments(self) -> bool:
        """Whether batches say which tokens belong together."""
        return self.document_masking is not False


class OptimizerConfig(Section):
    """Decoupled AdamW with the semantics of Composer's `DecoupledAdamW`."""

    learning_rate: PositiveFloat = Field(description="the schedule's peak")
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(
        description="p <- p (1 - (lr / weight_decay_reference_lr) weight_decay); 1e-6 at lr 1e-5 is AdamW's 0.1"
    )
    weight_decay_reference_lr: PositiveFloat | None = Field(
        default=None, description="Composer's initial_lr; null: learning_rate"
    )
    weight_decay_on: Literal["all", "matrices"] = Field(
        default="all", description="matrices: norms and biases are spared"
    )
    max_gradient_norm: PositiveFloat | None = Field(default=1.0, description="null: no clipping")


class ScheduleConfig(Section):
    """The learning rate over steps; the first update has a rate of 0 when warmup_steps > 0."""

    name: Literal["constant_with_warmup", "cosine_with_warmup"]
    warmup_steps: NonNegative
    total_steps: Positive | None = Field(default=None, description="length of the cosine; null: train.steps")
    final_lr_fraction: Fraction = 0.0


class TrainConfig(Section):
    """How long, and how much at a time."""

    steps: Positive | None = Field(default=None, description="null: as many whole batches as the mixture has")
    batch_size: Positive = Field(description="sequences in a step, over all devices")
    log_every: Positive = 1
    max_skipped_in_a_row: Positive = Field(
        default=5, description="the run fails after so many steps in a row whose loss or gradients are not finite"
    )
    spikes: SpikesConfig = SpikesConfig()
    verify_every: NonNegative = Field(
        default=0, description="steps; so often one is computed twice and compared bit for bit; 0: never"
    )
    compare_replicas_every: NonNegative = Field(
        default=0, description="steps; so often the replicas of all parameters and moments are compared; 0: never"
    )


class MeshConfig(Section):
    """replica x fsdp x context devices: parameters are sharded over fsdp and context, and replicated over replica.

    replica 1 is full shard; fsdp 1 is plain data parallelism. Each sequence is split over context.
    """

    replica: Positive = 1
    fsdp: Positive | None = Field(default=None, description="null: all devices that remain")
    context: Positive = Field(default=1, description="devices that share a sequence, for long ones")


class ExecutionConfig(Section):
    """How the step is computed; changes rounding at most, never what is learned."""

    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    fp8: bool = Field(
        default=False, description="the layers' matrix products in eight bits, on NVIDIA GPUs from Ada and Hopper on"
    )
    reduce_dtype: Literal["bfloat16", "float32"] = Field(
        default="float32", description="of gradients on the wire within an fsdp group"
    )
    replica_reduce_dtype: Literal["bfloat16", "float32"] = Field(
        default="float32", description="of gradients on the wire between replicas, once a step"
    )
    num_microbatches: Positive = 1
    remat: Literal["full", "attention", "dots", "offload", "none"] = Field(
        default="dots",
        description="what a layer keeps for its backward pass: its input, and attention's output, and its matrix "
        "products (offload: in host memory), or everything",
    )
    attention: Literal[
        "auto", "xla", "xla_chunked", "cudnn", "pallas_triton", "tokamax_triton", "tokamax_mosaic", "splash"
    ] = "auto"
    loss_chunk_tokens: Positive = Field(default=1024, description="tokens whose logits exist at once, per device")
    deterministic: bool = Field(
        default=False,
        description="on GPUs: the same bits in every run, at some cost in speed; elsewhere it is so anyway",
    )


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: Positive = Field(default=500, description="steps; the last step is always saved")
    keep_latest: Positive = 2
    keep_every: Positive | None = Field(default=None, description="steps; these are never deleted")
    local_dir: Path | None = Field(default=None, description="on a disk of each host: saved there first; null: nowhere")
    local_every: Positive | None = Field(default=None, description="steps; how often there")

    @model_validator(mode="after")
    def _local_is_whole(self) -> Self:
        if (self.local_dir is None) != (self.local_every is None):
            raise ValueError("give both local_dir and local_every, or neither")
        return self


class TelemetryConfig(Section):
    """Where metrics go."""

    console: bool = True
    jsonl: bool = True
    tensorboard: bool = True
    prometheus: Path | None = Field(
        default=None, description="a .prom file for node_exporter's textfile collector; null: none"
    )
    wandb: WandbConfig | None = Field(default=None, description="null: nothing is sent to Weights & Biases")
    mlflow: MlflowConfig | None = Field(default=None, description="null: nothing is sent to MLflow")
    peak_flops_per_device: PositiveFloat | None = Field(default=None, description="null: looked up by device kind")
    norms_every: NonNegative = Field(
        default=50, description="steps; so often norms of gradients, parameters and updates by group; 0: never"
    )

    @field_validator("prometheus")
    @classmethod
    def _read_by_node_exporter(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError(f"must end in .prom, or node_exporter passes it over: {path.with_suffix('.prom')}")
        return path


class RunConfig(Section):
    """Everything that decides a run."""

    output: Path
    seed: NonNegative = 0
    model: ModelConfig | None = Field(default=None, description="null: that of init_from")
    init_from: InitConfig | None = Field(default=None, description="null: random weights")
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig()
    compilation_cache: Path | None = Field(
        default=None, description="directory where compiled programs are kept for the next start; null: none"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _model_is_known(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("give model (its shape, for random weights) or init_from (a checkpoint to start from)")
        carries = self.init_from is not None and self.init_from.schedule == "carry"
        if carries and self.schedule.name == "cosine_with_warmup" and self.schedule.total_steps is None:
            raise ValueError(
                "init_from.schedule carry: give schedule.total_steps, counted from the source's first step"
            )
        if self.data.tokenizer is None and self.init_from is None:
            raise ValueError("give data.tokenizer: without init_from there is no checkpoint to take it from")
        return self

    def semantic(self) -> dict[str, Any]:
        """What is learned. Paths are left out where the content they name is hashed on its own (tokenizer, buckets)."""
        values = self.model_dump(mode="json")
        data = {key: values["data"][key] for key in ("sequence_length", "document_masking", "mixture")}
        # A longer run under the same schedule learns the same thing up to where the shorter one ended.
        return {
            "seed": values["seed"],
            "model": values["model"],
            "init_from": values["init_from"],
            "data": data,
            "optimizer": values["optimizer"],
            "schedule": values["schedule"],
            "train": {"batch_size": values["train"]["batch_size"]},
        }

    def execution_values(self) -> dict[str, Any]:
        """Where and how it is computed."""
        values = self.model_dump(mode="json")
        return {"mesh": values["mesh"], "execution": values["execution"]}

    def semantic_hash(self) -> str:
        """Names what is learned; guards resume."""
        return digest(self.semantic())

    def execution_hash(self) -> str:
        """Names where and how it is computed; may change on resume."""
        return digest(self.execution_values())
