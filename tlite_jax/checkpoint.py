"""Checkpoints: what a run is at a step, on disk, whole or absent.

A run directory holds `checkpoints/STEP/`, each an Orbax checkpoint of three items: `params` (stored, padded shapes),
`optimizer` (absent where there is none, as in an imported model) and `meta` (JSON: what the arrays mean). It is written
under another name, sealed (`checkpoint_seal`) and renamed, so a STEP directory is complete, on the disk and verifiable.
Steps are read from the directory, never from a cache.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from pydantic import Field

from tlite_jax.best import best_step_on_disk
from tlite_jax.checkpoint_peers import Talk, alone
from tlite_jax.checkpoint_reader import Reading, Target, read_sharded
from tlite_jax.checkpoint_seal import seal
from tlite_jax.checkpoint_slices import open_arrays, write_arrays
from tlite_jax.config import ModelConfig, Section
from tlite_jax.config.base import NonNegative
from tlite_jax.config_files import parse
from tlite_jax.data.files import sync
from tlite_jax.data.segments import Segment
from tlite_jax.errors import UserError
from tlite_jax.model.decoder import param_specs
from tlite_jax.optimizer import AdamState
from tlite_jax.sharding import abstract_params
from tlite_jax.train.state import abstract_state

FORMAT_VERSION = 2  # 1: saved without a manifest
PARTIAL = ".partial"


class Recent(Section):
    """The steps before a checkpoint, by which a run that goes on from it tells spikes."""

    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    spikes: tuple[NonNegative, ...] = Field(default=(), description="steps of the row of spikes that has not ended")


class Meta(Section):
    """What the arrays of a checkpoint mean."""

    format_version: Literal[1, 2] = 2
    step: NonNegative
    rows_consumed: NonNegative = 0
    segments: tuple[Segment, ...] = ()
    ledger: dict[str, NonNegative] = Field(default={}, description="bucket -> rows trained on so far")
    skipped: dict[str, NonNegative] = Field(default={}, description="bucket -> rows passed over so far")
    schedule_offset: NonNegative = 0
    model: ModelConfig
    weights_dtype: Literal["bfloat16", "float16", "float32"]
    origin: str
    config: dict[str, Any] | None = None
    tensor_dtypes: dict[str, str] = Field(default={})
    recent: Recent = Recent()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    run: Path
    step: int
    path: Path
    meta: Meta

    @property
    def tokenizer_dir(self) -> Path:
        """The Hugging Face tokenizer that goes with the weights."""
        return self.run / "tokenizer"

    @property
    def has_optimizer(self) -> bool:
        """False for an imported model."""
        return (self.path / "optimizer").is_dir()


def steps_on_disk(run: Path) -> list[int]:
    """The complete steps of a run, ascending."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if is_step(entry.name) and entry.is_dir())


def is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def find(path: Path, step: int | str | None = None) -> Checkpoint:
    """Opens a run's checkpoint; reads no arrays.

    Args:
      path: RUN, RUN@STEP, RUN@best or RUN/checkpoints/STEP.
      step: of RUN, before what stands behind an @; "best": the one with the smallest objective of the run's
        evaluations; None: the newest.

    Raises:
      UserError: nothing there, no such step, no best one, or a format that this version does not read.
    """
    path, behind = _split_step(Path(path))
    step = behind if step is None else step
    if isinstance(step, str):
        step = parse_step(step)
    if path.parent.name == "checkpoints" and is_step(path.name):
        run, step = path.parent.parent, int(path.name)
    else:
        run = path
    steps = steps_on_disk(run)
    if not steps:
        raise UserError(
            f"no checkpoint in {path}; give a run directory, one of its checkpoints/STEP, or `import` a model"
        )
    if step is None:
        step = steps[-1]
    elif step == "best":
        step = _best(run, steps)
    elif step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    directory = run / "checkpoints" / str(step)
    return Checkpoint(run, step, directory, _read_meta(directory))


def parse_step(text: str) -> int | Literal["best"]:
    """Reads the step that a user names: a number or "best".

    Raises:
      UserError: neither.
    """
    if text == "best":
        return "best"
    if not is_step(text):
        raise UserError(f"step {text!r} is neither a number nor best")
    return int(text)


def _split_step(path: Path) -> tuple[Path, str | None]:
    """RUN@STEP -> (RUN, STEP); a path that is there is taken as it is."""
    name, separator, behind = path.name.rpartition("@")
    if not separator or path.exists():
        return path, None
    return path.with_name(name) if name else path.parent, behind


def _best(run: Path, steps: list[int]) -> int:
    best = best_step_on_disk(run, steps)
    if best is None:
        raise UserError(
            f"{run} has no best step: evaluation.best was not set, or none of its checkpoints "
            f"({', '.join(map(str, steps))}) was evaluated; name a step"
        )
    return best


def _read_meta(directory: Path) -> Meta:
    file = directory / "meta" / "metadata"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is not a checkpoint of ours: cannot read {file.name} of meta") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version not in (1, FORMAT_VERSION):
        raise UserError(f"{directory}: checkpoint format {version}, this version reads 1 and {FORMAT_VERSION}")
    return parse(Meta, values, origin=str(file))


def load_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the parameters into host memory: a nested dict of numpy arrays, logical shapes, stored dtypes."""
    return jax.tree.map(np.asarray, open_params(checkpoint))


def open_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Opens the parameters without reading them: a nested dict of arrays of logical shapes, read slice by slice.

    They slice like numpy's, and `numpy.asarray` reads what is left. Checkpoints of earlier versions are not stored for
    it: a slice of theirs takes the memory of the whole parameter.
    """
    return open_arrays(checkpoint.path / "params", param_specs(checkpoint.meta.model))


def restore_params(checkpoint: Checkpoint, mesh: Mesh, dtype: str = "float32") -> Any:
    """Reads the parameters into their shards on a mesh, padded for it whatever they were padded for."""
    return read_sharded(checkpoint.path / "params", abstract_params(param_specs(checkpoint.meta.model), mesh, dtype))


def restore_optimizer(checkpoint: Checkpoint, mesh: Mesh) -> AdamState:
    """Reads Adam's moments into their shards on a mesh.

    Raises:
      UserError: the checkpoint has none.
    """
    if not checkpoint.has_optimizer:
        raise UserError(f"{checkpoint.path} holds no optimizer state; use init_from.optimizer: reset")
    abstract = abstract_state(checkpoint.meta.model, mesh).optimizer
    return AdamState(**read_sharded(checkpoint.path / "optimizer", abstract._asdict()))


class StateReading:
    """Parameters and moments of a checkpoint on their way into their shards on a mesh.

    Args:
      checkpoint: with an optimizer.
      mesh: where they go.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh) -> None:
        wanted = abstract_state(checkpoint.meta.model, mesh)
        self._path, self._mesh = checkpoint.path.absolute(), mesh
        self._params = Reading(self._path / "params", wanted.params)
        self._optimizer = Reading(self._path / "optimizer", wanted.optimizer._asdict())
        self.bytes = self._params.bytes + self._optimizer.bytes
        self.filled: frozenset[str] = frozenset()  # names of the files that have been read into their places
        self._finished = False

    def targets(self) -> dict[str, list[Target]]:
        """By name of a file, where its bytes belong."""
        found = {**self._params.targets(), **self._optimizer.targets()}
        return {file.relative_to(self._path).as_posix(): targets for file, targets in found.items()}

    def is_of(self, checkpoint: Checkpoint, mesh: Mesh) -> bool:
        """Whether it can be finished for these."""
        return not self._finished and self._path == checkpoint.path.absolute() and self._mesh == mesh

    def finish(self) -> tuple[Any, AdamState]:
        """Reads what has not been read; to be called once."""
        self._finished = True
        filled = {self._path / name for name in self.filled}
        return self._params.finish(filled), AdamState(**self._optimizer.finish(filled))


def save_model(
    run: Path,
    params: Any,
    model: ModelConfig,
    *,
    weights_dtype: Literal["bfloat16", "float16", "float32"],
    origin: str,
    tensor_dtypes: dict[str, str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a model without optimizer as step 0 of a run; the tokenizer is the caller's to place beside it.

    Args:
      run: directory; made if absent.
      params: nested dict of arrays, logical shapes, any float dtype; read in slices, so that they may lie anywhere.
      model: their shape.
      weights_dtype: the dtype that `export` writes by default.
      origin: where they came from, for people.
      tensor_dtypes: Hugging Face names of tensors whose dtype differs from weights_dtype.
      report: called with (bytes written, bytes in all).
    """
    meta = Meta(step=0, model=model, weights_dtype=weights_dtype, origin=origin, tensor_dtypes=tensor_dtypes or {})
    final = run.absolute() / "checkpoints" / "0"
    partial = final.with_name(f"0{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    # Orbax writes the tree, and an empty array for each leaf; its record of the tree holds no shapes.
    empty = jax.tree.map(lambda leaf: np.zeros((), leaf.dtype), params)
    with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as checkpointer:
        checkpointer.save(
            partial,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(empty), meta=ocp.args.JsonSave(meta.model_dump(mode="json"))
            ),
        )
    for arrays in (*partial.glob("params/*ocdbt*"), partial / "params" / "d"):
        shutil.rmtree(arrays) if arrays.is_dir() else arrays.unlink()
    write_arrays(partial / "params", params, report)
    publish(partial, final, alone())


def publish(partial: Path, final: Path, talk: Talk) -> None:
    """Seals a checkpoint that is written, each process what it has written, and gives it its name."""

    def give_name() -> None:
        partial.rename(final)
        sync(final.parent)

    seal(partial, talk, give_name)
