"""Checkpoints on disk: which there are, and what each says of itself.

A run directory holds `checkpoints/STEP/`, each an Orbax checkpoint of three items: `params` (stored, padded shapes),
`optimizer` (absent where there is none, as in an imported model) and `meta` (JSON: what the arrays mean). It is written
under another name, sealed (`seal`) and renamed, so a STEP directory is complete, on the disk and verifiable.
Steps are read from the directory, never from a cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tlite_jax.best import best_step_on_disk
from tlite_jax.config import ModelConfig, Section
from tlite_jax.config.base import NonNegative
from tlite_jax.config_files import parse
from tlite_jax.data.segments import Segment
from tlite_jax.errors import UserError

FORMAT_VERSION = 2  # 1: saved without a manifest
TOKENIZER_DIRECTORY = "tokenizer"  # of a run


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
    """A complete checkpoint on disk, or the part of it that one process has on its local disk.

    Attributes:
      run, step: whose, and when.
      path: its directory.
      meta: what it says of itself.
      part: the process whose part it is; None: it is whole.
    """

    run: Path
    step: int
    path: Path
    meta: Meta
    part: int | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """The Hugging Face tokenizer that goes with the weights."""
        return self.run / TOKENIZER_DIRECTORY

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


def find_part(run: Path, directory: Path, process: int) -> Checkpoint:
    """Opens what a process has of a run's checkpoint on its local disk; reads no arrays.

    Raises:
      UserError: it is none.
    """
    return Checkpoint(run, int(directory.name), directory, _read_meta(directory), process)


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
