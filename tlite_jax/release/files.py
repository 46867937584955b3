"""What lies in a release's directories, and a model that is read from one of its files."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.checksums import sha256_of
from tlite_jax.bridge.files import contained, shown
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.bridge.hazards import hazards
from tlite_jax.bridge.verify import is_hf_directory
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.model.decoder import param_specs
from tlite_jax.release.result import ReleasedFile
from tlite_jax.sharding import place_params

_TYPES = {file_type.code: name for name, file_type in FILE_TYPES.items()}


@dataclass(frozen=True)
class Exports:
    """What is released.

    Attributes:
      hf: the Hugging Face directory, if there is one.
      ggufs: type -> file, most bits first.
    """

    hf: Path | None
    ggufs: dict[str, Path]


class MainKind(NamedTuple):
    """The tensor type that most of a GGUF file's weights have; their share; the lengths of its tensors' rows."""

    name: str
    share: float
    row_lengths: frozenset[int]


def find_exports(places: Iterable[Path]) -> Exports:
    """Looks for exports in directories, and one level below.

    Args:
      places: directories, or GGUF files.

    Raises:
      UserError: nothing there, two of one kind, a file that is not GGUF or of an unknown type, what leads elsewhere.
    """
    directories: list[Path] = []
    files: list[Path] = []
    for place in places:
        if not place.exists():
            raise UserError(f"--exports {place} does not exist")
        inside = [place, *_directories(place)] if place.is_dir() else []
        directories += [entry for entry in inside if is_hf_directory(entry)]
        held = [file for entry in inside for file in sorted(entry.glob("*.gguf"))]
        files += [contained(file.parent, file.name, str(file.parent)) for file in held] if inside else [place]
    if not directories and not files:
        raise UserError("--exports: no Hugging Face directory and no .gguf file there; export the checkpoint first")
    if len(directories) > 1:
        raise UserError(f"--exports: several Hugging Face directories: {', '.join(map(str, directories))}; give one")
    for name, problem in [found for entry in directories for found in hazards(entry)][:1]:
        raise UserError(f"--exports: {directories[0]}: {name}: {problem}")
    types: dict[str, Path] = {}
    for file in files:
        kind = type_of(file)
        if kind in types:
            raise UserError(f"--exports: {types[kind]} and {file} are both {kind}; give one of them")
        types[kind] = file
    return Exports(directories[0] if directories else None, {kind: types[kind] for kind in FILE_TYPES if kind in types})


def _directories(place: Path) -> list[Path]:
    """Those in a directory."""
    found = sorted(entry for entry in place.iterdir() if entry.is_dir())
    for entry in found:
        if not entry.resolve().is_relative_to(place.resolve()):
            raise UserError(f"--exports: {entry} is a link out of {place}; give what it leads to by its own path")
    return found


def type_of(file: Path) -> str:
    """The type that a GGUF file says it is.

    Raises:
      UserError: not a GGUF file, or of a type that is not ours.
    """
    metadata, _ = gguf_file.read(file)
    code = metadata.get("general.file_type")
    if not isinstance(code, int) or code not in _TYPES:
        raise UserError(f"{file}: general.file_type {shown(repr(code))} is none of {', '.join(FILE_TYPES)}")
    return _TYPES[code]


def bits_per_weight(file: Path) -> float:
    """Bits of tensor data, a weight."""
    tensors = _tensors(file)
    return 8 * sum(tensor.num_bytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)


def main_kind(file: Path) -> MainKind:
    """The tensor type that holds most of a GGUF file's weights."""
    weights: dict[str, int] = {}
    lengths: dict[str, set[int]] = {}
    for tensor in _tensors(file):
        kind = str(tensor.kind.name)
        weights[kind] = weights.get(kind, 0) + math.prod(tensor.shape)
        lengths.setdefault(kind, set()).add(tensor.shape[-1])
    kind = max(weights, key=lambda name: weights[name])
    return MainKind(kind, weights[kind] / sum(weights.values()), frozenset(lengths[kind]))


def _tensors(file: Path) -> list[gguf_file.TensorEntry]:
    with file.open("rb") as opened:
        _, tensors, _ = gguf_file.Header(file, opened, file.stat().st_size).read()
    return tensors


def read_gguf(file: Path, model: ModelConfig, mesh: Mesh, dtype: str) -> Any:
    """Stored, sharded parameters of a GGUF file.

    Raises:
      UserError: not a model of this shape.
    """
    imported = import_gguf(file)
    if shape_of(imported.model) != shape_of(model):
        raise UserError(f"{file} is a model of another shape than the checkpoint")
    return place_params(imported.params, param_specs(model), mesh, dtype)


def shape_of(model: ModelConfig) -> dict[str, Any]:
    """What of a model's config changes what it computes."""
    return model.model_dump(exclude={"initializer_range"})


def hashed(exports: Exports, directory: Path) -> tuple[ReleasedFile, ...]:
    """Every file of the exports, with its hash."""
    files = sorted(path for path in exports.hf.iterdir() if path.is_file()) if exports.hf else []
    for file in exports.ggufs.values():
        files += [file, *sorted(file.parent.glob(f"{file.name}.*"))]
    root = directory.resolve()

    def name(path: Path) -> str:
        inside = path.resolve()
        return str(inside.relative_to(root)) if inside.is_relative_to(root) else str(path)

    return tuple(ReleasedFile(path=name(path), bytes=path.stat().st_size, sha256=sha256_of(path)) for path in files)
