"""llama.cpp as a reference: its quantiser, and models on which its choice of types depends."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.gguf_export import export_gguf
from tlite_jax.bridge.gguf_metadata import ReleaseFacts
from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.config import ModelConfig
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import map_specs

# made by `make test-llama-cpp` with TLITE_RECORD=1, from what llama.cpp wrote
RECORDED = Path(__file__).with_name("llama_cpp_recorded.json")


def made_model(**changes: Any) -> ModelConfig:
    """A small model whose rows K-quants divide; 16 layers, so that the first eighth and sixteenth differ."""
    values = {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(values | changes))


# models that llama.cpp's rules treat differently; the bytes of the first are compared too
MODELS = {
    "gqa4 tied": made_model(),
    "mha untied scaled bias": made_model(
        num_key_value_heads=4,
        tie_word_embeddings=False,
        attention_bias=True,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "80 layers gqa2 untied": made_model(num_hidden_layers=80, num_key_value_heads=2, tie_word_embeddings=False),
    "80 layers mha": made_model(num_hidden_layers=80, num_key_value_heads=4),
    "rows of 240 and 320": made_model(
        num_hidden_layers=9,
        hidden_size=240,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=48,
        intermediate_size=320,
    ),
    "rows of 576 untied": made_model(
        num_hidden_layers=30,
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=64,
        tie_word_embeddings=False,
    ),
}
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KEPT: list[Any] = []  # ctypes callbacks that C code still calls
BYTES_OF = "gqa4 tied"


def made_params(model: ModelConfig) -> dict[str, Any]:
    """Bell-shaped weights from integer arithmetic alone, so that they are the same on every machine and numpy."""
    generator = np.random.PCG64(20240717)

    def made(spec: Any) -> np.ndarray:
        raw = generator.random_raw(int(np.prod(spec.shape))).view(np.uint16).reshape(-1, 4).astype(np.int64)
        return ((raw.sum(axis=1) - 131070).astype(np.float32) / np.float32(1 << 20)).reshape(spec.shape)

    return map_specs(made, param_specs(model))


def export(params: Mapping[str, Any], model: ModelConfig, path: Path, kind: str, **options: Any) -> Path:
    """Our export, without a tokenizer."""
    export_gguf(ParamsSource(params, model), model, path, kind, {}, ReleaseFacts("made"), **options)
    return path


def contents(path: Path) -> dict[str, tuple[str, str]]:
    """Tensor name -> (type, SHA-256 of its bytes), in the file's order."""
    with path.open("rb") as file:
        header = gguf_file.Header(path, file, path.stat().st_size)
        _, tensors, begin = header.read()
        result = {}
        for tensor in tensors:
            file.seek(begin + tensor.offset)
            content = file.read(tensor.num_bytes)
            result[tensor.name] = (tensor.kind.name, hashlib.sha256(content).hexdigest())
    return result


def types_in_brief(tensors: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(name, type) of every tensor -> the types of each part of a block, in runs: {"ffn_down.weight": "Q6_K*2 Q4_K*9"}.

    Tensors come in the order of their layers.
    """
    parts: dict[str, list[str]] = {}
    for name, kind in tensors:
        parts.setdefault(name.split(".", 2)[2] if name.startswith("blk.") else name, []).append(kind)
    return {
        part: " ".join(f"{kind}*{len(list(run))}" for kind, run in itertools.groupby(kinds))
        for part, kinds in parts.items()
    }


def llama_quantize(source: Path, target: Path, kind: str, *, requantize: bool = False) -> Path:
    """llama.cpp's own quantiser, as `llama-quantize [--allow-requantize] SOURCE TARGET KIND` calls it."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind].code
    params.nthread = 2
    params.allow_requantize = requantize
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert status == 0, f"llama_model_quantize to {kind} failed with {status}"
    return target


def quiet() -> None:
    """Lets llama.cpp print errors only."""
    import ctypes
    import sys

    import llama_cpp

    def log(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    _KEPT.append(llama_cpp.llama_log_callback(log))
    llama_cpp.llama_log_set(_KEPT[-1], ctypes.c_void_p(0))
