"""The schema of a run: one frozen, strict value that describes it completely; one file per part."""

from tlite_jax.config.base import (
    Section,
    digest,
)
from tlite_jax.config.evaluation import (
    EvaluationConfig,
)
from tlite_jax.config.labels import (
    ChatConfig,
    LabellerConfig,
)
from tlite_jax.config.mixture import (
    BalanceConfig,
    DeclaredBucket,
    MixtureConfig,
    MixtureGroup,
)
from tlite_jax.config.prepare import (
    DecontaminationConfig,
    EvaluationSetConfig,
    HeldOutConfig,
    NearDuplicatesConfig,
    PrepareConfig,
    SourceConfig,
)
from tlite_jax.config.run import (
    CheckpointConfig,
    DataConfig,
    ExecutionConfig,
    InitConfig,
    Llama3RopeScaling,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TelemetryConfig,
    TrainConfig,
)
from tlite_jax.config.spikes import (
    SpikesConfig,
)
from tlite_jax.config.watchdog import (
    WatchdogConfig,
)

__all__ = [
    "BalanceConfig",
    "ChatConfig",
    "CheckpointConfig",
    "DataConfig",
    "DeclaredBucket",
    "DecontaminationConfig",
    "EvaluationConfig",
    "EvaluationSetConfig",
    "ExecutionConfig",
    "HeldOutConfig",
    "InitConfig",
    "LabellerConfig",
    "Llama3RopeScaling",
    "MeshConfig",
    "MixtureConfig",
    "MixtureGroup",
    "ModelConfig",
    "NearDuplicatesConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "SpikesConfig",
    "TelemetryConfig",
    "TrainConfig",
    "WatchdogConfig",
    "digest",
]
