"""Other projects' programs over the released files: Transformers over the HF export, llama.cpp over a GGUF file."""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tlite_jax.release.passes import Measured, compare
from tlite_jax.release.sample import Windows

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KEPT: list[Any] = []  # a callback that C code still calls

FLOAT32_BOUND = 5e-6
MOST_TIMES_WORSE = 1.5
# RMS, relative. Measured: 0.015 for SmolLM2-135M, 0.03 for random weights whose attention is sharp.
BFLOAT16_BOUND = 0.1


def find(name: str) -> ModuleType | None:
    """The module, or None where it is not installed, or cannot be loaded."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # a library whose own libraries are missing
        return None


def transformers_logits(directory: Path, tokens: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """Yields float32 logits [T, V] of each row under AutoModelForCausalLM on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    ).eval()
    for row in tokens:
        with torch.no_grad():
            yield model(torch.from_numpy(row[None].astype(np.int64))).logits[0].float().numpy()


def judge_logits(found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[list[str], list[str]]:
    """Compares our logits with Transformers'.

    float32: the largest difference, relative to the largest logit. bfloat16: how much a model's rounding is amplified
    depends on its weights, so where float32 is there, ours may be MOST_TIMES_WORSE times as far from it as
    Transformers' bfloat16 is; where it is not, both may differ by BFLOAT16_BOUND.

    Args:
      found: dtype -> (ours, Transformers'), each [texts, T, V] float32.

    Returns:
      What was found, a part for each dtype; and which of that is beyond its bound.
    """
    values, wrong = [], []
    for dtype, (ours, theirs) in found.items():
        same = f"same top {float(np.mean(ours.argmax(-1) == theirs.argmax(-1))):.2%}"
        if dtype == "float32":
            relative = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
            value, fine = f"float32 {relative:.2e}, {same}", relative <= FLOAT32_BOUND
        elif "float32" in found:
            truth = found["float32"][1]
            distance, usual = _rms(ours - truth) / _rms(truth), _rms(theirs - truth) / _rms(truth)
            value = f"bfloat16 {distance:.2e}, Transformers' {usual:.2e}, {same}"
            fine = distance <= MOST_TIMES_WORSE * usual
        else:
            relative = _rms(ours - theirs) / _rms(theirs)
            value, fine = f"bfloat16 {relative:.2e}, {same}", relative <= BFLOAT16_BOUND
        values.append(value)
        wrong += [] if fine else [f"beyond the bound: {value}"]
    return values, wrong


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def llama_cpp_compare(llama_cpp: Any, file: Path, windows: Windows, base: np.ndarray) -> Measured:
    """Compares llama.cpp's predictions over a GGUF file with a base's; see `Passes.compare`."""
    model = llama_cpp.Llama(str(file), n_ctx=windows.tokens.shape[1], logits_all=True, verbose=False)
    found = []
    for row, tokens in enumerate(windows.tokens):
        model.reset()
        model.eval(tokens.tolist())
        logits = np.asarray(model.scores[windows.first : windows.last], np.float32)
        found.append(compare(logits, base[row], windows.targets[row]))
    return {name: np.concatenate([part[name] for part in found]).astype(np.float64) for name in found[0]}


def quiet(llama_cpp: Any) -> None:
    """Lets llama.cpp print errors only."""
    import ctypes
    import sys

    def log(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    _KEPT.append(llama_cpp.llama_log_callback(log))
    llama_cpp.llama_log_set(_KEPT[-1], ctypes.c_void_p(0))
