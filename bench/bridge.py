"""The bridge at real sizes: HF -> checkpoint -> HF and GGUF, against a plain copy of as many bytes.

    python bench/bridge.py --size 8b --scratch DIRECTORY

Makes a Llama of random bfloat16 weights, imports it, exports it to Hugging Face and to Q4_K_M, each in a process of its
own with what it reads dropped from the page cache, reads the shards that came back and compares their hashes. Before
and after each step a plain copy reads the same files and writes as many bytes, in files of a shard's size, each with an
fdatasync. Quantising is also timed alone, in memory, on all cores: GGUF cannot be written faster. Each directory is
deleted when the next steps do not need it; the room for two models and two shards is asked for first.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from launch.quickstart_parts.base_model import tiny_tokenizer
from tlite_jax.bridge.ahead import in_order
from tlite_jax.bridge.checksums import sha256_of
from tlite_jax.bridge.gguf_quantize import encode
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
# bytes written for each byte read, known before the step has run
EXPECTED_SHARE = {"HF -> checkpoint": 1.0, "checkpoint -> HF": 1.0, "checkpoint -> Q4_K_M": 0.306}
_BLOCK = 8 << 20


class Row(NamedTuple):
    """One step, measured."""

    step: str
    read_bytes: int
    written_bytes: int
    seconds: float
    copy_seconds: tuple[float, float]  # before and after
    peak_bytes: int
    cpu_seconds: float  # user and system
    copy_cpu_seconds: tuple[float, float]

    @property
    def ratio(self) -> float:
        """Of a plain copy's speed."""
        return sum(self.copy_seconds) / 2 / self.seconds


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
            values = (rows.stop - rows.start) * math.prod(shape[1:])
            bits = np.frombuffer(np.random.default_rng([number, rows.start]).bytes(2 * values), np.uint16)
            # a random sign and mantissa, and an exponent of four: 0.008 to 0.12
            return (bits & 0x81FF | 0x3C00).view(dtype).reshape(rows.stop - rows.start, *shape[1:])

        return read

    tensors = [
        OutgoingTensor(slot.hugging_face, slot.shape, dtype, made(slot.shape, number))
        for number, slot in enumerate(slots(model))
    ]
    return write_directory(directory, tensors, SHARD_BYTES, lambda done, total: None)


def _texts() -> list[str]:
    return [f"Слово {number} и word {number * 7919}; x_{number} = {number}." for number in range(400)]


def measure(step: str, source: Path, target: Path, code: str, scratch: Path) -> Row:
    """Runs `code` in a process of its own, between two copies of as many bytes."""
    files = _files(source)
    read_bytes = sum(file.stat().st_size for file in files)
    before, before_cpu = plain_copy(files, int(EXPECTED_SHARE[step] * read_bytes), scratch / "copy")
    _drop(files)
    seconds, cpu, peak = _run(code)
    written = sum(file.stat().st_size for file in _files(target))
    after, after_cpu = plain_copy(files, written, scratch / "copy")
    return Row(step, read_bytes, written, seconds, (before, after), peak, cpu, (before_cpu, after_cpu))


def _run(code: str) -> tuple[float, float, int]:
    """Returns seconds, CPU seconds, and the most memory that the process held."""
    with tempfile.NamedTemporaryFile("r") as status:
        # ru_maxrss would count what this process held when it started the other one.
        last = f"Path({status.name!r}).write_text(Path('/proc/self/status').read_text())"
        words = [sys.executable, "-c", f"from pathlib import Path; {code}; {last}"]
        started, before = time.monotonic(), os.times()
        ended = subprocess.run(words, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
        seconds, after = time.monotonic() - started, os.times()
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read(), re.MULTILINE)
    if ended.returncode or found is None:
        raise SystemExit(f"failed: {code}")
    cpu_seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu_seconds, int(found[1]) * 1024


def plain_copy(sources: Iterable[Path], written: int, target: Path) -> tuple[float, float]:
    """Seconds, and CPU seconds, to read the files, cold, and to write `written` bytes, deleted as they get there."""
    sources = list(sources)
    _drop(sources)
    started, started_cpu, left, room = time.monotonic(), time.process_time(), written, SHARD_BYTES
    filler = os.urandom(_BLOCK)
    output = target.open("wb", buffering=0)

    def put(block: bytes) -> None:
        nonlocal output, left, room
        if room <= 0:
            os.fdatasync(output.fileno())
            output.close()
            output, room = target.open("wb", buffering=0), SHARD_BYTES
        count = output.write(block[: max(left, 0)])
        left, room = left - count, room - count

    for source in sources:
        with source.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                put(block)
    while left > 0:
        put(filler)
    os.fdatasync(output.fileno())
    output.close()
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu
    target.unlink()
    return seconds, cpu_seconds


def quantised_per_second(kind: str = "Q4_K", num_slices: int = 16) -> float:
    """Bytes of bfloat16 weights quantised in a second, on all cores, from memory to memory."""
    random = np.random.default_rng(0).standard_normal((1 << 10, 1 << 12), np.float32)
    slices = [random.astype(ml_dtypes.bfloat16)] * num_slices
    started = time.monotonic()
    for _ in in_order(lambda rows: encode(rows, kind, "random"), slices):
        pass
    return sum(rows.nbytes for rows in slices) / (time.monotonic() - started)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _drop(files: Iterable[Path]) -> None:
    """Takes files out of the page cache."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(size: str, scratch: Path, *, with_gguf: bool = True) -> list[Row]:
    """All steps, in order; raises SystemExit when there is no room, or bytes did not come back."""
    model = model_config(size)
    require_room(model, scratch)
    source, checkpoint, back, gguf = (scratch / name for name in ("source", "run", "back", "gguf"))
    sums = make_source(source, model)
    code = f"from launch.import_ import import_model; import_model({str(source)!r}, Path({str(checkpoint)!r}))"
    rows = [measure("HF -> checkpoint", source, checkpoint, code, scratch)]
    shutil.rmtree(source)
    code = f"from launch.export import export_model; export_model(Path({str(checkpoint)!r}), Path({str(back)!r}))"
    rows.append(measure("checkpoint -> HF", checkpoint, back, code, scratch))
    _drop(_files(back))
    if differing := [name for name, digest in sums.items() if sha256_of(back / name) != digest]:
        raise SystemExit(f"these did not come back byte for byte: {', '.join(differing)}")
    shutil.rmtree(back)
    if not with_gguf:
        return rows
    code = (
        "from launch.export import export_gguf_files; from tlite_jax.bridge.gguf_metadata import ReleaseFacts; "
        f"export_gguf_files(Path({str(checkpoint)!r}), Path({str(gguf)!r}), ['Q4_K_M'], ReleaseFacts('made'))"
    )
    rows.append(measure("checkpoint -> Q4_K_M", checkpoint, gguf, code, scratch))
    return rows


def require_room(model: ModelConfig, scratch: Path) -> None:
    """Raises SystemExit unless the disk has room for all that is there at once."""
    needed = 2 * sum(2 * math.prod(slot.shape) for slot in slots(model)) + 2 * SHARD_BYTES
    if (free := shutil.disk_usage(scratch).free) < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} needed; give another --scratch")


def main() -> None:
    """Prints one line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1b")
    parser.add_argument("--scratch", type=Path, help="directory with room; default: the system's temporary one")
    parser.add_argument("--no-gguf", action="store_true", help="leave out Q4_K_M, which takes most of the time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="bridge-", dir=arguments.scratch))
    try:
        rows = run(arguments.size, scratch, with_gguf=not arguments.no_gguf)
    finally:
        shutil.rmtree(scratch)
    quantised = None if arguments.no_gguf else quantised_per_second()
    if arguments.json:
        steps = [{**row._asdict(), "ratio": row.ratio} for row in rows]
        print(json.dumps({"steps": steps, "quantised_bytes_per_second": quantised}, indent=1))
        return
    print(
        f"{'step':22}{'read GB':>9}{'written':>9}{'s':>8}{'MB/s':>8}{'copies s':>16}{'of a copy':>11}{'peak GB':>9}"
        f"{'CPU s/GB':>10}{'of copies':>15}"
    )
    for row in rows:
        print(_line(row))
    if quantised is not None:
        alone = rows[-1].read_bytes / quantised
        print(
            f"Q4_K alone, in memory, on all cores: {quantised / 1e6:.0f} MB/s of bfloat16, {alone:.1f} s for this model"
        )
    print("every shard came back byte for byte")


def _line(row: Row) -> str:
    moved = row.read_bytes + row.written_bytes
    copies = " and ".join(f"{seconds:.1f}" for seconds in row.copy_seconds)
    cpus = " and ".join(f"{seconds / row.read_bytes * 1e9:.2f}" for seconds in row.copy_cpu_seconds)
    return (
        f"{row.step:22}{row.read_bytes / 1e9:9.2f}{row.written_bytes / 1e9:9.2f}{row.seconds:8.1f}"
        f"{moved / 1e6 / row.seconds:8.0f}{copies:>16}{row.ratio:10.2f}x{row.peak_bytes / 1e9:9.2f}"
        f"{row.cpu_seconds / row.read_bytes * 1e9:10.2f}{cpus:>15}"
    )


if __name__ == "__main__":
    main()
