"""Hugging Face directories and GGUF files: intact, or exactly what is wrong.

Everything is read: layout against the files' sizes, tensors against the config, values for NaN and infinity, the
tokenizer against the vocabulary, and hashes where a checksum file of ours lies beside.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tlite_jax.bridge import gguf_file, safetensors_io
from tlite_jax.bridge.assemble import WEIGHT_DTYPES, expected_slots, harmless_extras, mismatches
from tlite_jax.bridge.checksums import SUFFIX, SUMS_NAME, read_sums, sha256_of, sums_beside
from tlite_jax.bridge.files import contained, read_json, shown
from tlite_jax.bridge.gguf import ROPE_FACTORS, model_config_from_gguf
from tlite_jax.bridge.hazards import hazards
from tlite_jax.bridge.hf_config import model_config_from_hf
from tlite_jax.bridge.safetensors_io import INDEX_NAME, SINGLE_NAME, Problem
from tlite_jax.bridge.stored import StoredTensor
from tlite_jax.bridge.tokenizer import CARRIED, TOKENIZER, check_vocabulary, read_tokenizer, tokenizer_from_gguf
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.verification import Damage, Progress, Verification

HF_KIND, GGUF_KIND = "HF directory", "GGUF file"
_CONFIG = "config.json"
_SLICE_VALUES = 1 << 22
# floats by name: the bits of the exponent, all set in NaN and infinity
_EXPONENTS: dict[str, Any] = {
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
}


def is_hf_directory(path: Path) -> bool:
    """Whether a directory holds a Hugging Face model in safetensors, told by the names in it."""
    return path.is_dir() and any((path / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes or its name, or a directory that holds some."""
    if path.is_dir():
        return any(path.glob("*.gguf"))
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def verify_hf(directory: Path, progress: Progress | None = None) -> Verification:
    """Checks a Hugging Face directory; never raises for what is in it.

    Args:
      directory: holds config.json and safetensors.
      progress: called with (what, bytes done, bytes in all).
    """
    return _HfVerifier(directory, progress or (lambda *_: None)).run()


def verify_gguf(path: Path, progress: Progress | None = None) -> Verification:
    """Checks a GGUF file, or every one in a directory; never raises for what is in it."""
    root = path if path.is_dir() else path.parent
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    return _GgufVerifier(path, root, files, progress or (lambda *_: None)).run()


class _Verifier:
    """What both share: damages, bytes counted, values and hashes."""

    def __init__(self, path: Path, root: Path, files: Iterable[Path], progress: Progress) -> None:
        self._path, self._root, self._progress = path, root, progress
        self._entries = list(files)
        self._files = [file for file in self._entries if file.is_file()]
        self._damages: list[Damage] = []
        self._unchecked: list[str] = []
        self._done, self._total = 0, sum(file.stat().st_size for file in self._files)
        self._checks = ["layout", "tensors against the config", "values for NaN and infinity", "tokenizer"]

    def _outcome(self, kind: str) -> Verification:
        size = sum(file.stat().st_size for file in self._files)
        checked = ", ".join(self._checks)
        damages, unchecked = tuple(self._damages), tuple(sorted(self._unchecked))
        return Verification(kind, self._path, len(self._files), size, checked, damages, unchecked)

    def _damage(self, file: str, problem: object, offset: int | None = None, size: int | None = None) -> None:
        text = str(problem).replace(f"{self._root}/", "").removeprefix(f"{file}: ")
        self._damages.append(Damage(file, text, offset, size))

    def _places(self, file: str, begin: int, problems: Iterable[Problem]) -> None:
        """Notes problems of a file's layout, whose data begins at `begin`; all that the file's end cuts off as one."""
        cut = []
        for problem in problems:
            if problem.tensor:
                cut.append(problem)
            else:
                self._damage(file, problem.text, begin + problem.begin, problem.size)
        if cut:
            others = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            text = f"truncated, fetch it again: {shown(cut[0].tensor)}{others} end beyond the file"
            self._damage(file, text, begin + cut[0].begin, max(problem.size for problem in cut))

    def _count(self, what: str, size: int) -> None:
        self._done = min(self._done + size, self._total)
        self._progress(what, self._done, self._total)

    def _compare(
        self, file: str, model: ModelConfig, stored: Mapping[str, StoredTensor], names: str, harmless: Iterable[str]
    ) -> None:
        """Names and shapes against what the config describes."""
        try:
            slots = expected_slots(model, stored, Path(file))
        except UserError as error:
            self._damage(file, error)
            return
        found = mismatches({getattr(slot, names): slot for slot in slots}, stored, harmless)
        for label, wrong in zip(("missing", "extra", "wrong shape"), found, strict=True):
            for name in wrong:
                self._damage(file, f"{label}: {shown(name)}")

    def _values(self, file: str, stored: Mapping[str, StoredTensor]) -> None:
        """Counts what is no number."""
        for name, tensor in stored.items():
            try:
                nan, infinite = _not_finite(tensor)
            except (UserError, ValueError, MemoryError) as error:
                self._damage(file, f"{shown(name)} cannot be read: {error}")
                continue
            if nan or infinite:
                self._damage(file, f"{shown(name)} has {nan} NaN and {infinite} infinite values")

    def _hash(self, path: Path, name: str, expected: str) -> None:
        """Compares a file's hash, unless it is known to be damaged: it may be of any size."""
        if any(damage.file == name for damage in self._damages):
            return
        found = sha256_of(path, lambda size: self._count("hashing", size))
        if found != expected:
            self._damage(name, f"SHA-256 is {found}, it was written with {expected}", 0, path.stat().st_size)


class _HfVerifier(_Verifier):
    def __init__(self, directory: Path, progress: Progress) -> None:
        super().__init__(directory, directory, directory.iterdir(), progress)

    def run(self) -> Verification:
        for name, problem in hazards(self._root):
            self._damage(name, problem)
        stored = self._stored()
        model = self._model()
        if model is not None:
            self._tokenizer(model)
            if stored is not None:
                self._tensors(model, stored)
        if stored is not None:
            self._values("weights", stored)
        self._sums()
        return self._outcome(HF_KIND)

    def _model(self) -> ModelConfig | None:
        try:
            return model_config_from_hf(read_json(contained(self._root, _CONFIG, _CONFIG), 1 << 24), _CONFIG)
        except UserError as error:
            self._damage(_CONFIG, error)
            return None

    def _stored(self) -> dict[str, StoredTensor] | None:
        """The tensors of every shard that can be read; None when one cannot."""
        if (self._root / SINGLE_NAME).is_file():
            return self._shard(SINGLE_NAME)
        try:
            weight_map = read_json(contained(self._root, INDEX_NAME, INDEX_NAME), 1 << 24).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError("'weight_map' must map tensor names to file names")
        except UserError as error:
            self._damage(INDEX_NAME, error)
            return None
        stored: dict[str, StoredTensor] = {}
        whole = True
        for shard in sorted(set(weight_map.values())):
            found = self._shard(shard)
            whole = whole and found is not None
            if found is None:
                continue
            claimed = {name for name, file in weight_map.items() if file == shard}
            for name in sorted(claimed - found.keys()):
                self._damage(INDEX_NAME, f"{shown(name)} should be in {shown(shard)}, which lacks it")
            for name in sorted(found.keys() - claimed):
                self._damage(INDEX_NAME, f"{shown(name)} in {shown(shard)} is not listed")
            stored |= found
        return stored if whole else None

    def _shard(self, name: str) -> dict[str, StoredTensor] | None:
        label = shown(name)
        try:
            path = contained(self._root, name, INDEX_NAME)
            spans, begin, size = safetensors_io.read_spans(path)
        except UserError as error:
            self._damage(label, error)
            return None
        problems = list(safetensors_io.layout_problems(spans, size - begin))
        self._places(label, begin, problems)
        return None if problems else safetensors_io.read_file(path)

    def _tensors(self, model: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
        harmless: Iterable[str] = ()
        try:
            harmless = harmless_extras(stored, model, Path("weights"))
        except UserError as error:
            self._damage("weights", error)
        self._compare("weights", model, stored, "hugging_face", harmless)
        for name, tensor in stored.items():
            if tensor.dtype not in WEIGHT_DTYPES and name not in harmless:
                self._damage("weights", f"{shown(name)} is {tensor.dtype}; weights are {', '.join(WEIGHT_DTYPES)}")

    def _tokenizer(self, model: ModelConfig) -> None:
        if not (self._root / TOKENIZER).exists():
            self._checks.remove("tokenizer")
            return
        try:
            files = read_tokenizer(self._root, {})
            check_vocabulary(files, model, TOKENIZER)
        except UserError as error:
            self._damage(TOKENIZER, error)

    def _sums(self) -> None:
        """Files against SHA256SUMS, where it is."""
        names = {file.name for file in self._files} - {SUMS_NAME}
        if sums_beside(self._root) is None:
            self._unchecked += [name for name in names if not self._is_ours(name)]
            return
        self._checks.append(f"SHA-256 of every file in {SUMS_NAME}")
        try:
            sums = read_sums(contained(self._root, SUMS_NAME, SUMS_NAME))
        except UserError as error:
            self._damage(SUMS_NAME, error)
            return
        for name, expected in sums.items():
            if name not in names:
                self._damage(name, f"missing; it was written, says {SUMS_NAME}")
                continue
            try:
                self._hash(contained(self._root, name, SUMS_NAME), name, expected)
            except UserError as error:
                self._damage(name, error)
        for name in sorted(names - sums.keys()):
            if self._is_ours(name):
                self._damage(name, f"is not listed in {SUMS_NAME}")
            else:
                self._unchecked.append(name)

    @staticmethod
    def _is_ours(name: str) -> bool:
        return name in (_CONFIG, INDEX_NAME, *CARRIED) or name.endswith(".safetensors")


class _GgufVerifier(_Verifier):
    def run(self) -> Verification:
        for file in self._entries:
            try:
                self._file(contained(file.parent, file.name, str(file.parent)))
            except UserError as error:
                self._damage(file.name, error)
        return self._outcome(GGUF_KIND if len(self._files) == 1 else f"{GGUF_KIND}s")

    def _file(self, path: Path) -> None:
        name = path.name
        self._layout(path, name)
        self._sum(path, name)

    def _layout(self, path: Path, name: str) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = gguf_file.Header(path, file, size)
            try:
                metadata, tensors, begin = header.read()
            except UserError as error:
                self._damage(name, error, min(header.position, size))
                return
        problems = [
            *gguf_file.layout_problems(tensors, size - begin),
            *gguf_file.gaps(tensors, size - begin, header.alignment),
        ]
        self._places(name, begin, problems)
        stored = gguf_file.stored_tensors(path, tensors, begin)
        # What lies nowhere cannot be read: the factors are the one tensor that the config needs.
        readable = {key: tensor for key, tensor in stored.items() if not problems or key != ROPE_FACTORS}
        try:
            model = model_config_from_gguf(metadata, readable, name)
        except UserError as error:
            self._damage(name, error)
        else:
            self._compare(name, model, stored, "gguf", (ROPE_FACTORS,))
            self._tokenizer(name, metadata, model)
        if not problems:
            self._values(name, stored)

    def _tokenizer(self, name: str, metadata: Mapping[str, object], model: ModelConfig) -> None:
        tokens = metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) != model.vocab_size:
            self._damage(name, f"{len(tokens)} tokens for an embedding of {model.vocab_size} rows")
        try:
            check_vocabulary(tokenizer_from_gguf(metadata, name), model, name)
        except UserError as error:
            self._damage(name, error)

    def _sum(self, path: Path, name: str) -> None:
        beside = sums_beside(path)
        if beside is None:
            self._checks.append(f"no hash: {name}{SUFFIX} is not there")
            return
        self._checks.append(f"SHA-256 in {beside.name}")
        try:
            sums = read_sums(contained(beside.parent, beside.name, beside.name))
        except UserError as error:
            self._damage(beside.name, error)
            return
        if name in sums:
            self._hash(path, name, sums[name])
        elif beside.name != SUMS_NAME:
            self._damage(beside.name, f"does not speak of {name}")


def _not_finite(tensor: StoredTensor) -> tuple[int, int]:
    """How many values are NaN and how many infinite; a few million values at a time."""
    rows = tensor.shape[0] if tensor.shape else 1
    per_row = math.prod(tensor.shape[1:])
    step = max(_SLICE_VALUES // max(per_row, 1), 1)
    nan = infinite = 0
    for begin in range(0, rows if per_row else 0, step):
        array = np.asarray(tensor.read(slice(begin, begin + step)))
        if array.dtype.name in _EXPONENTS and _has_full_exponent(array):
            with np.errstate(invalid="ignore"):
                nan += int(np.isnan(array).sum())
                infinite += int(np.isinf(array).sum())
    return nan, infinite


def _has_full_exponent(array: np.ndarray) -> bool:
    """Whether any value is NaN or infinite, told by its bits: quicker than arithmetic on short floats."""
    mask = _EXPONENTS[array.dtype.name]
    return bool(((array.view(mask.dtype) & mask) == mask).any())
