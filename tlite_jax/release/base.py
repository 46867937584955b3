"""The model that a run began as: where it is, and whether it goes through our checkpoint and back unchanged."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tlite_jax.bridge import safetensors_io
from tlite_jax.bridge.assemble import Imported
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.hf import export_hf, import_hf
from tlite_jax.bridge.safetensors_io import StoredTensor
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.bridge.verify import is_gguf, is_hf_directory
from tlite_jax.checkpoint import Checkpoint, find, open_params, save_model
from tlite_jax.errors import UserError
from tlite_jax.release.weights import Comparison, compare_stored

_LONGEST_CHAIN = 32


@dataclass(frozen=True)
class Base:
    """Where a run came from.

    Attributes:
      name: for people.
      files: the HF directory or GGUF file; None where none of that name is on this machine.
    """

    name: str
    files: Path | None


def find_base(checkpoint: Checkpoint, given: str | None) -> Base | None:
    """The base that the user names, or else what the run's and its bases' records lead to; None: random weights.

    Args:
      checkpoint: what is released.
      given: an HF directory, a GGUF file or a checkpoint.

    Raises:
      UserError: `given` is none of these.
    """
    if given is not None:
        path = Path(given)
        if is_model(path):
            return Base(given, path)
        return _origin(find(path))
    return _origin(checkpoint)


def is_model(path: Path) -> bool:
    """Whether a path holds another project's weights."""
    return path.exists() and (is_hf_directory(path) or (path.is_file() and is_gguf(path)))


def _origin(checkpoint: Checkpoint) -> Base | None:
    """Follows init_from to the import that it began with."""
    name = checkpoint.meta.origin
    for _ in range(_LONGEST_CHAIN):
        config = checkpoint.meta.config
        if config is None:
            origin = Path(checkpoint.meta.origin)
            return Base(checkpoint.meta.origin, origin if is_model(origin) else None)
        start = config.get("init_from")
        if not start:
            return None
        name = str(start["path"])
        try:
            checkpoint = find(Path(name), start.get("step"))
        except UserError:
            return Base(name, None)
    return Base(name, None)


def round_trip(base: Path, scratch: Path) -> Comparison:
    """Imports a model, saves it as a checkpoint, exports that, and compares the weights with where they came from.

    Args:
      base: an HF directory or a GGUF file; quantised weights are compared as the float32 numbers that they stand for.
      scratch: a directory with room for the model twice; nothing stays in it.

    Raises:
      UserError: it cannot be imported.
    """
    quantised = base.is_file() and is_gguf(base)
    imported = import_gguf(base) if quantised else import_hf(base)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="base.") as name:
        run = Path(name) / "run"
        run.mkdir()
        save_model(
            run,
            imported.params,
            imported.model,
            weights_dtype=imported.weights_dtype,
            origin=str(base),
            tensor_dtypes=imported.tensor_dtypes,
        )
        found = find(run)
        dtype: Any = "float32" if quantised else found.meta.weights_dtype
        others = {} if quantised else found.meta.tensor_dtypes
        export_hf(open_params(found), found.meta.model, Path(name) / "hf", None, dtype, others)
        back = safetensors_io.read_directory(Path(name) / "hf")
        return compare_stored(_expected(base, imported, back, quantised), back)


def _expected(
    base: Path, imported: Imported, back: dict[str, StoredTensor], quantised: bool
) -> dict[str, StoredTensor]:
    """The base's tensors by their Hugging Face names, those that carry nothing left out."""
    names = ParamsSource(imported.params, imported.model)
    if not quantised and is_hf_directory(base):
        stored = safetensors_io.read_directory(base)
        return {name: stored[name] for name in names.shapes}
    return {
        name: StoredTensor(shape, back[name].dtype, partial(names.read, name)) for name, shape in names.shapes.items()
    }
