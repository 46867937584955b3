"""What both contenders of `gpu_step.py` are given: a shape, tokens and weights; no framework is imported here.

Weights come from integer arithmetic (`murmur3`'s finaliser on an element's index), so that either framework makes the
same bits on its device in milliseconds, and nothing of many GB travels between processes.
"""

import json
import resource
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tlite_jax.config import ModelConfig

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TOY = {
    **LLAMA_3_8B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
BLOCK_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
BLOCK_NORMS = ("attention_norm", "mlp_norm")

# Of an element's index: the three multipliers and shifts of `hash_steps`. (MurmurHash3's finaliser, A. Appleby.)
MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
SHIFTS = (16, 13, 16)
MATRIX_WIDTH = np.float32(0.02 * 12**0.5)  # of a uniform distribution with standard deviation 0.02
NORM_WIDTH = np.float32(0.25)  # around 1; a power of two, so that a fused multiply-add changes nothing


@dataclass(frozen=True)
class Problem:
    """Everything a contender must know, as JSON on its command line.

    Attributes:
      shape: of `ModelConfig` without num_hidden_layers.
      layers: the depths to measure, ascending.
      sequence: tokens of a row.
      microbatches: rows of a step, one sequence each.
      chunk_tokens: tokens whose logits exist at once.
      dtype: of the matrix products; masters are float32.
      device: "cuda" or "cpu".
      repeats: timed steps of a depth in a turn.
      deadline: time.time() at which everything must be over.
      cache: directory of compiled programs.
      torch_backend: of torch.compile.
      execution: further fields of our ExecutionConfig.
      profile, target: directories to write to, or None.
    """

    shape: dict[str, Any]
    layers: tuple[int, ...]
    sequence: int
    microbatches: int
    chunk_tokens: int
    dtype: str
    device: str
    repeats: int
    deadline: float
    cache: str
    torch_backend: str
    execution: dict[str, Any]
    profile: str | None = None
    target: str | None = None
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # torch's: p <- p (1 - learning_rate * weight_decay)
    max_norm: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        """Over all microbatches."""
        return self.microbatches * self.sequence

    def model(self, layers: int) -> ModelConfig:
        """The model at a depth."""
        return ModelConfig(**self.shape, num_hidden_layers=layers)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, [microbatches, sequence] int32; the last token of a row has no target: -1."""
        vocabulary = self.shape["vocab_size"]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (self.microbatches, self.sequence), dtype=np.int32)
        ends = np.full((self.microbatches, 1), -1, np.int32)
        return tokens, np.concatenate([tokens[:, 1:], ends], axis=1)

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Problem":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "layers": tuple(values["layers"])})


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a parameter, of one layer's for those of blocks. An untied head is a parameter of its own."""
    D, F, V = model.hidden_size, model.intermediate_size, model.vocab_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    blocks: dict[str, tuple[int, ...]] = {
        "query": (queries, D),
        "key": (keys, D),
        "value": (keys, D),
        "output": (D, queries),
        "gate": (F, D),
        "up": (F, D),
        "down": (D, F),
        "attention_norm": (D,),
        "mlp_norm": (D,),
    }
    return {**blocks, "embedding": (V, D), "head": (V, D), "final_norm": (D,)}


def salt(name: str, layer: int) -> int:
    """Tells the elements of one matrix from those of another; a layer's weights are the same at every depth."""
    return zlib.crc32(f"{name}.{layer}".encode())


def is_norm(name: str) -> bool:
    """Whether a parameter is the scale of a norm."""
    return name.endswith("norm")


def report(**message: Any) -> None:
    """Tells the parent process something: one line of JSON."""
    print(json.dumps(message), flush=True)


def depths_in_time(problem: Problem, name: str) -> Iterator[int]:
    """The depths to measure one after the other, as long as another fits before the deadline; says if one does not."""
    longest = 0.0
    for layers in problem.layers:
        start = time.time()
        if start + longest > problem.deadline:
            report(event="note", text=f"{name}: no time left for {layers} layers and more")
            return
        yield layers
        longest = max(longest, 1.2 * (time.time() - start))


def peak_host_bytes() -> int:
    """The most memory this process has held so far; the measure on a CPU, where frameworks count nothing."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
