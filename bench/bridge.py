"""The bridge at real sizes: HF -> checkpoint -> HF and GGUF, against a plain copy of as many bytes.

    python bench/bridge.py --size 1b

Makes a Llama of random bfloat16 weights, imports it, exports it to Hugging Face and to Q4_K_M, each in a process of its
own with the source dropped from the page cache, and compares the bytes that came back. Before each, as many bytes are
read and written by a plain copy that ends with fdatasync. Needs free disk of about five times the model.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from launch.quickstart_parts.base_model import tiny_tokenizer
from tlite_jax.bridge.checksums import SUMS_NAME, read_sums
from tlite_jax.bridge.hf_config import hf_config
from tlite_jax.bridge.names import slots
from tlite_jax.bridge.safetensors_io import OutgoingTensor, write_directory
from tlite_jax.config import ModelConfig

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCAB_SIZES = {"tiny": 4096, "1b": 128256, "8b": 128256}
SHARD_BYTES = 5 * 10**9
_BLOCK = 8 << 20


class Row(NamedTuple):
    """One step, measured."""

    step: str
    read_bytes: int
    written_bytes: int
    seconds: float
    copy_seconds: float
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Of a plain copy's speed."""
        return self.copy_seconds / self.seconds


def model_config(size: str) -> ModelConfig:
    """Llama 3's shape; heads of four share a key."""
    dims = SIZES[size]
    return ModelConfig(
        **dims,
        vocab_size=VOCAB_SIZES[size],
        num_key_value_heads=dims["num_attention_heads"] // 4,
        head_dim=dims["hidden_size"] // dims["num_attention_heads"],
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
    )


def make_source(directory: Path, model: ModelConfig) -> dict[str, str]:
    """Writes a Hugging Face model of random weights, slice by slice; returns the hashes of its shards."""
    directory.mkdir()
    tiny_tokenizer(directory, _texts(), vocab_size=400)
    (directory / "config.json").write_text(json.dumps(hf_config(model, "bfloat16", {})))
    dtype = np.dtype(ml_dtypes.bfloat16)

    def made(shape: tuple[int, ...], number: int) -> Callable[[slice], np.ndarray]:
        def read(rows: slice) -> np.ndarray:
            random = np.random.default_rng([number, rows.start])
            values = random.standard_normal((rows.stop - rows.start, *shape[1:]), np.float32)
            return (values * np.float32(0.02)).astype(dtype)

        return read

    tensors = [
        OutgoingTensor(slot.hugging_face, slot.shape, dtype, made(slot.shape, number))
        for number, slot in enumerate(slots(model))
    ]
    return write_directory(directory, tensors, SHARD_BYTES, lambda done, total: None)


def _texts() -> list[str]:
    return [f"Слово {number} и word {number * 7919}; x_{number} = {number}." for number in range(400)]


def measure(step: str, source: Path, target: Path, code: str, scratch: Path) -> Row:
    """Runs `code` in a process of its own; the copy of as many bytes comes first."""
    source_files = _files(source)
    read_bytes = sum(file.stat().st_size for file in source_files)
    _drop(source_files)
    seconds, peak = _run(code)
    os.sync()
    written = sum(file.stat().st_size for file in _files(target))
    _drop(source_files)
    return Row(step, read_bytes, written, seconds, plain_copy(source_files, written, scratch), peak)


def _run(code: str) -> tuple[float, int]:
    """Returns seconds, and the most memory that the process held."""
    started = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], {**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"failed: {code}")
    return time.monotonic() - started, usage.ru_maxrss * 1024


def plain_copy(sources: Iterable[Path], written: int, scratch: Path) -> float:
    """Seconds to read the files and to write `written` bytes, to the disk."""
    started, left = time.monotonic(), written
    target, block = scratch / "copy", b""
    with target.open("wb", buffering=0) as output:
        for source in sources:
            with source.open("rb", buffering=0) as file:
                while block := file.read(_BLOCK) or b"":
                    left -= output.write(block[: max(left, 0)])
        filler = os.urandom(_BLOCK)
        while left > 0:
            left -= output.write(filler[:left])
        os.fdatasync(output.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _drop(files: Iterable[Path]) -> None:
    """Takes files out of the page cache."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(size: str, scratch: Path) -> list[Row]:
    """All steps, in order; raises SystemExit when bytes did not come back."""
    model = model_config(size)
    source, checkpoint, back, gguf = (scratch / name for name in ("source", "run", "back", "gguf"))
    sums = make_source(source, model)
    rows = [
        measure(
            "HF -> checkpoint",
            source,
            checkpoint,
            f"from launch.import_ import import_model; import pathlib; "
            f"import_model({str(source)!r}, pathlib.Path({str(checkpoint)!r}))",
            scratch,
        ),
        measure(
            "checkpoint -> HF",
            checkpoint,
            back,
            f"from launch.export import export_model; from pathlib import Path; "
            f"export_model(Path({str(checkpoint)!r}), Path({str(back)!r}))",
            scratch,
        ),
    ]
    returned = read_sums(back / SUMS_NAME)
    if differing := [name for name, digest in sums.items() if returned.get(name) != digest]:
        raise SystemExit(f"these did not come back byte for byte: {', '.join(differing)}")
    code = (
        f"from launch.export import export_gguf_files; from pathlib import Path; "
        f"from tlite_jax.bridge.gguf_metadata import ReleaseFacts; "
        f"export_gguf_files(Path({str(checkpoint)!r}), Path({str(gguf)!r}), ['Q4_K_M'], ReleaseFacts('made'))"
    )
    rows.append(measure("checkpoint -> Q4_K_M", checkpoint, gguf, code, scratch))
    return rows


def main() -> None:
    """Prints one line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--scratch", type=Path, help="directory with room; default: the system's temporary one")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bridge-", dir=arguments.scratch))
    try:
        rows = run(arguments.size, scratch)
    finally:
        shutil.rmtree(scratch)
    if arguments.json:
        print(json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=1))
        return
    print(f"{'step':22}{'read GB':>9}{'written':>9}{'s':>8}{'MB/s':>8}{'of a copy':>11}{'peak GB':>9}")
    for row in rows:
        print(_line(row))
    print("every shard came back byte for byte")


def _line(row: Row) -> str:
    moved: Any = row.read_bytes + row.written_bytes
    return (
        f"{row.step:22}{row.read_bytes / 1e9:9.2f}{row.written_bytes / 1e9:9.2f}{row.seconds:8.1f}"
        f"{moved / 1e6 / row.seconds:8.0f}{row.ratio:10.2f}x{row.peak_bytes / 1e9:9.2f}"
    )


if __name__ == "__main__":
    main()
