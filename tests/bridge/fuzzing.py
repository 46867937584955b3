"""Files of strangers, made by the thousand: what the bridge does with each is checked against one oracle.

A mutated file must be refused in one line, or read; what is read must be the original's wherever no byte was changed,
and `verify` must find the change by the hash that was written with the file. No mutation may crash, hang, or take much
memory. `python -m tests.bridge.fuzzing --count 20000` runs many (`make test-fuzz`).
"""

import argparse
import collections
import dataclasses
import json
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.bridge import llama_cpp_reference as reference
from tests.bridge.tiny import train_tokenizer
from tlite_jax.bridge import gguf_file, safetensors_io
from tlite_jax.bridge.checksums import SUFFIX, sums_text
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.gguf_export import export_gguf
from tlite_jax.bridge.gguf_metadata import ReleaseFacts
from tlite_jax.bridge.gguf_tokenizer import tokenizer_to_gguf
from tlite_jax.bridge.hf import export_hf, import_hf
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.bridge.tokenizer import pre_tokenizer_of, read_files
from tlite_jax.bridge.verify import verify_gguf, verify_hf
from tlite_jax.errors import UserError

MODEL = reference.made_model(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
)
SLOWEST_SECONDS, MOST_BYTES = 10.0, 512 << 20
INTERESTING = (0, 1, 7, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def made_tokenizer(directory: Path) -> dict[str, bytes]:
    """A small tokenizer, as Hugging Face files."""
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(pre_tokenizer_of("gpt-2"), vocab_size=330)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>")
    fast.save_pretrained(directory)
    return read_files(directory)


def made_hf(directory: Path, max_shard_bytes: int = 10**9) -> Path:
    """A Hugging Face directory of ours, with its hashes."""
    with tempfile.TemporaryDirectory() as tokenizer:
        made_tokenizer(Path(tokenizer))
        export_hf(
            reference.made_params(MODEL), MODEL, directory, Path(tokenizer), "float32", max_shard_bytes=max_shard_bytes
        )
    return directory


def made_gguf(directory: Path) -> Path:
    """A GGUF file of ours, with its hash beside it."""
    path = directory / "made.Q8_0.gguf"
    with tempfile.TemporaryDirectory() as tokenizer:
        metadata = tokenizer_to_gguf(made_tokenizer(Path(tokenizer)), MODEL.vocab_size, "tokenizer")
    source = ParamsSource(reference.made_params(MODEL), MODEL)
    digest = export_gguf(source, MODEL, path, "Q8_0", metadata, ReleaseFacts("made", languages=("ru",)))
    path.with_name(path.name + SUFFIX).write_text(sums_text({path.name: digest}))
    return path


class Mutation:
    """One way to spoil bytes, chosen by a generator; remembers which bytes of the original it touched."""

    def __init__(self, random: np.random.Generator, header_bytes: int) -> None:
        self._random, self._header = random, header_bytes
        self.touched: list[tuple[int, int]] = []
        self.moved = False

    def apply(self, content: bytes) -> bytes:
        """Returns the spoiled bytes."""
        changed = bytearray(content)
        for _ in range(int(self._random.integers(1, 4))):
            way = _WAYS[int(self._random.integers(len(_WAYS)))]
            way(self, changed)
        return bytes(changed)

    def place(self, size: int) -> int:
        """A position, mostly in the header, which is small."""
        limit = min(self._header, size) if self._random.random() < 0.8 else size
        return int(self._random.integers(max(limit, 1)))

    def touch(self, begin: int, end: int) -> None:
        self.touched.append((begin, end))

    def flip(self, content: bytearray) -> None:
        if content:
            at = self.place(len(content))
            content[at] ^= 1 << int(self._random.integers(8))
            self.touch(at, at + 1)

    def overwrite(self, content: bytearray) -> None:
        at = self.place(len(content))
        length = min(int(self._random.integers(1, 9)), len(content) - at)
        content[at : at + length] = self._random.bytes(length)
        self.touch(at, at + length)

    def number(self, content: bytearray) -> None:
        form = "<Q" if self._random.random() < 0.6 else "<I"
        at = self.place(len(content))
        value = INTERESTING[int(self._random.integers(len(INTERESTING)))]
        packed = struct.pack(form, value & (1 << 8 * struct.calcsize(form)) - 1)
        packed = packed[: len(content) - at]
        content[at : at + len(packed)] = packed
        self.touch(at, at + len(packed))

    def digits(self, content: bytearray) -> None:
        """A number in JSON becomes another of as many digits."""
        places = [at for at in range(min(self._header, len(content))) if 48 <= content[at] <= 57]
        if places:
            at = places[int(self._random.integers(len(places)))]
            content[at] = 48 + int(self._random.integers(10))
            self.touch(at, at + 1)

    def cut(self, content: bytearray) -> None:
        del content[self.place(len(content)) :]
        self.moved = True

    def extend(self, content: bytearray) -> None:
        content += self._random.bytes(int(self._random.integers(1, 100)))
        self.moved = True

    def insert(self, content: bytearray) -> None:
        at = self.place(len(content))
        content[at:at] = self._random.bytes(int(self._random.integers(1, 9)))
        self.moved = True

    def remove(self, content: bytearray) -> None:
        at = self.place(len(content))
        del content[at : at + int(self._random.integers(1, 9))]
        self.moved = True

    def repeat(self, content: bytearray) -> None:
        """A piece again somewhere else: names twice, offsets of other tensors."""
        source, at = self.place(len(content)), self.place(len(content))
        piece = content[source : source + int(self._random.integers(1, 80))]
        piece = piece[: len(content) - at]
        content[at : at + len(piece)] = piece
        self.touch(at, at + len(piece))


_WAYS: list[Callable[[Mutation, bytearray], None]] = [
    Mutation.flip,
    Mutation.flip,
    Mutation.overwrite,
    Mutation.number,
    Mutation.digits,
    Mutation.cut,
    Mutation.extend,
    Mutation.insert,
    Mutation.remove,
    Mutation.repeat,
]


class Subject:
    """One original, its import and its verifier, and the file that is spoiled in it."""

    def __init__(self, original: Path, scratch: Path, file: str) -> None:
        self.kind = "GGUF" if file.endswith(".gguf") else file
        self._path = Path(shutil.copytree(original, scratch)) / file
        self._content = self._path.read_bytes()
        self._is_gguf = file.endswith(".gguf")
        self._imported = self._import()
        self._places, self._header = self._layout()

    def run(self, random: np.random.Generator) -> str:
        """Spoils the file, checks the outcome, and returns its name: refused, or read."""
        mutation = Mutation(random, self._header)
        changed = mutation.apply(self._content)
        if changed == self._content:
            return "unchanged"
        self._path.write_bytes(changed)
        started = time.monotonic()
        try:
            outcome = self._check(mutation)
            self._check_verify()
        finally:
            self._path.write_bytes(self._content)
        assert time.monotonic() - started < SLOWEST_SECONDS, "it took too long"
        return outcome

    def _import(self) -> Any:
        """All of it, weights too."""
        opened = import_gguf(self._path) if self._is_gguf else import_hf(self._path.parent)
        return dataclasses.replace(opened, params=jax.tree.map(np.asarray, opened.params))

    def _check(self, mutation: Mutation) -> str:
        refusal = ""
        try:
            imported = self._import()
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal, f"an error of several lines: {refusal}"
            assert len(refusal) < 8000, f"an error of {len(refusal)} characters"
            return "refused"
        if mutation.moved or any(begin < self._header for begin, _ in mutation.touched):
            return "read, header changed"
        assert imported.model == self._imported.model
        assert imported.tokenizer == self._imported.tokenizer
        for (path, layer, rows), begin, end in self._places:
            if not any(begin < last and first < end for first, last in mutation.touched):
                ours, theirs = (_leaf(value.params, path, layer)[rows] for value in (imported, self._imported))
                assert ours.tobytes() == theirs.tobytes(), f"{path} {layer} changed, its bytes did not"
        return "read, data changed"

    def _check_verify(self) -> None:
        found = verify_gguf(self._path) if self._is_gguf else verify_hf(self._path.parent)
        assert found.damages, "verify found nothing"
        assert all("\n" not in str(damage) for damage in found.damages)

    def _layout(self) -> tuple[list[tuple[tuple[str, int | None, Any], int, int]], int]:
        """Where in the file each tensor of ours lies, and where the data begins."""
        from tlite_jax.bridge.names import slots

        if self._is_gguf:
            with self._path.open("rb") as file:
                _, tensors, begin = gguf_file.Header(self._path, file, len(self._content)).read()
            spans = {tensor.name: (tensor.offset, tensor.offset + tensor.num_bytes) for tensor in tensors}
        elif self._path.suffix == ".safetensors":
            found, begin, _ = safetensors_io.read_spans(self._path)
            spans = {name: (span.begin, span.end) for name, span in found.items()}
        else:
            return [], len(self._content)
        places = []
        for slot in slots(MODEL):
            name = slot.gguf if self._is_gguf else slot.hugging_face
            if name in spans:
                first, last = spans[name]
                places.append(((slot.path, slot.layer, slice(None)), begin + first, begin + last))
        return places, begin


def _leaf(params: Any, path: str, layer: int | None) -> np.ndarray:
    for key in path.split("/"):
        params = params[key]
    return params if layer is None else params[layer]


def subjects(directory: Path) -> list[Subject]:
    """A GGUF file, a safetensors shard, and the small files beside them."""
    made_hf(directory / "hf", max_shard_bytes=30_000)
    made_gguf(directory / "gguf")
    shard = sorted((directory / "hf").glob("*.safetensors"))[0].name
    names = [("gguf", "made.Q8_0.gguf")] * 3 + [("hf", shard)] * 3
    names += [("hf", name) for name in (safetensors_io.INDEX_NAME, "config.json", "tokenizer.json", "SHA256SUMS")]
    return [Subject(directory / kind, directory / f"copy{i}", name) for i, (kind, name) in enumerate(names)]


def fuzz(count: int, seed: int, directory: Path, report: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Runs mutations; a failure names the seed that repeats it.

    Returns:
      How often each outcome came, by file.
    """
    found = subjects(directory)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for number in range(count):
        subject = found[number % len(found)]
        try:
            outcome = subject.run(np.random.default_rng([seed, number]))
        except BaseException as error:
            where = f"{subject.kind}, seed {seed}, number {number}"
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        outcomes[subject.kind][outcome] += 1
        report(number + 1)
    return {kind: dict(sorted(counts.items())) for kind, counts in outcomes.items()}


def peak_bytes() -> int:
    """Most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs many mutations and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fuzz(20, 0, Path(scratch) / "warm")
        before, started = peak_bytes(), time.monotonic()
        outcomes = fuzz(arguments.count, arguments.seed, Path(scratch) / "fuzz", _say)
    grown = peak_bytes() - before
    print(json.dumps(outcomes, indent=1))
    print(f"{arguments.count} mutations in {time.monotonic() - started:.0f} s, peak memory grew by {grown >> 20} MB")
    assert grown < MOST_BYTES, "it took too much memory"


def _say(done: int) -> None:
    if done % 1000 == 0:
        print(done, flush=True)


if __name__ == "__main__":
    main()
