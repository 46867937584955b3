"""What a GGUF file of ours says about its model, besides the tokenizer.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; those of our own begin with `tlite_jax.`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.bridge.names import slots
from tlite_jax.config import Llama3RopeScaling, ModelConfig
from tlite_jax.errors import UserError

SCALING_KEY, INITIALIZER_KEY = "tlite_jax.rope_scaling", "tlite_jax.initializer_range"
_SCALING = tuple(Llama3RopeScaling.model_fields)
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_NOT_IN_NAMES = set('/\\:*?"<>|')
_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class ReleaseFacts:
    """What only the person who releases a model knows, and where in which run it comes from.

    Attributes:
      name: of the model, for people; also the first part of file names.
      license: an SPDX identifier in lower case, or the hub's name of a licence (llama3).
      base_model: hub id (org/name) of the model it was trained from, or another name.
      languages: two- or three-letter codes.
      recipe_hash: of the run's config: what was trained, on what.
      step: of the run.
      version: of tlite_jax.
    """

    name: str
    license: str | None = None
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    recipe_hash: str | None = None
    step: int | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if (
            not self.name
            or self.name.startswith(".")
            or not self.name.isprintable()
            or set(self.name) & set('/\\:*?"<>|')
        ):
            raise UserError(f"name {self.name!r} cannot be part of a file's name; choose another with --name")
        if wrong := [code for code in self.languages if not _LANGUAGE.fullmatch(code)]:
            raise UserError(f"language {wrong[0]!r} is not a two- or three-letter code such as ru")


def model_metadata(model: ModelConfig, file_type: str, facts: ReleaseFacts) -> dict[str, Any]:
    """All but the tokenizer's keys; the first is general.architecture.

    Returns:
      Strings, bools, ints (uint32), floats (float32) and lists of them, by key.
    """
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": facts.name,
        **_general(model, facts),
        "llama.block_count": model.num_hidden_layers,
        "llama.context_length": model.max_position_embeddings,
        "llama.embedding_length": model.hidden_size,
        "llama.feed_forward_length": model.intermediate_size,
        "llama.attention.head_count": model.num_attention_heads,
        "llama.attention.head_count_kv": model.num_key_value_heads,
        "llama.attention.key_length": model.head_dim,
        "llama.attention.value_length": model.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "llama.rope.dimension_count": model.head_dim,
        "llama.rope.freq_base": float(model.rope_theta),
        "llama.vocab_size": model.vocab_size,
        "general.file_type": FILE_TYPES[file_type].code,
        "general.quantization_version": _QUANTIZATION_VERSION,
        **_ours(model, facts),
    }


def rope_scaling_from(metadata: Mapping[str, Any]) -> tuple[float, float, float, int] | None:
    """Factor, low, high and original length of Llama 3's RoPE scaling, in a file of ours that has it."""
    values = metadata.get(SCALING_KEY)
    if not isinstance(values, list) or len(values) != len(_SCALING):
        return None
    if not all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in values):
        return None
    factor, low, high, original = (float(str(np.float32(value))) for value in values)
    return factor, low, high, round(original)


def _general(model: ModelConfig, facts: ReleaseFacts) -> dict[str, Any]:
    from gguf import size_label

    count = sum(math.prod(slot.shape) for slot in slots(model))
    values: dict[str, Any] = {"general.size_label": size_label(count, 0, 0, 0)}
    if facts.license:
        values["general.license"] = facts.license
    if facts.base_model:
        organization, _, name = facts.base_model.rpartition("/")
        values |= {"general.base_model.count": 1, "general.base_model.0.name": name}
        if organization and "/" not in organization:
            values["general.base_model.0.organization"] = organization
            values["general.base_model.0.repo_url"] = _HUB + facts.base_model
    if facts.languages:
        values["general.languages"] = list(facts.languages)
    return values


def _ours(model: ModelConfig, facts: ReleaseFacts) -> dict[str, Any]:
    """What GGUF has no key for, so that an import gives the same model again and people find the run."""
    values: dict[str, Any] = {INITIALIZER_KEY: float(model.initializer_range)}
    if model.rope_scaling is not None:
        values[SCALING_KEY] = [float(getattr(model.rope_scaling, name)) for name in _SCALING]
    if facts.recipe_hash:
        values["tlite_jax.recipe_hash"] = facts.recipe_hash
    if facts.step is not None:
        values["tlite_jax.step"] = facts.step
    if facts.version:
        values["tlite_jax.version"] = facts.version
    return values
