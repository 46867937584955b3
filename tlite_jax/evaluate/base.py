"""The model that a run is compared with: the one that the first of its stages began as, or the one that it names."""

from pathlib import Path
from typing import NamedTuple

from tlite_jax.checkpoint import Checkpoint, find
from tlite_jax.config import RunConfig, digest
from tlite_jax.errors import UserError
from tlite_jax.evaluate.base_files import read_record


class Base(NamedTuple):
    """A base; `checkpoint` is None for the run's own random weights, and for one that is gone but was measured."""

    name: str
    fingerprint: str
    checkpoint: Checkpoint | None
    is_random: bool = False


def find_base(config: RunConfig, directory: Path) -> Base:
    """The base of a run: the config's, else the model that the first of its stages began as.

    Args:
      config: resolved (`train.run.resolve`): init_from.step is a number.
      directory: of the run, where a base that has been deleted since may have left its measurements.

    Raises:
      UserError: it is not there, and has not been measured.
    """
    if config.evaluation.base is None and config.init_from is None:
        weights = {"model": config.model_dump(mode="json")["model"], "seed": config.seed}
        return Base("random weights", digest(weights), None, is_random=True)
    if config.evaluation.base is not None:
        path, step = config.evaluation.base, None
    else:
        assert config.init_from is not None
        path, step = _first_stage(config)
    name = _name(path, step)
    try:
        checkpoint = find(path, step)
    except UserError as error:
        kept = read_record(directory)
        if kept is not None and kept["base"] == name:
            return Base(name, kept["fingerprint"], None)
        raise UserError(f"the base to compare with is gone ({error}); restore it or set evaluation.base") from error
    return Base(name, fingerprint(checkpoint), checkpoint)


def _name(path: Path, step: int | None) -> str:
    return str(path) if step is None else f"{path} step {step}"


def _first_stage(config: RunConfig) -> tuple[Path, int | None]:
    """Goes back from stage to stage to the one that did not begin as another run."""
    assert config.init_from is not None
    step = config.init_from.step
    place: tuple[Path, int | None] = config.init_from.path, step if isinstance(step, int) else None
    seen = set()
    while place not in seen:
        seen.add(place)
        try:
            stage = find(*place).meta.config
        except UserError:
            break  # the caller says what is missing
        if stage is None:
            break
        named, before = stage["evaluation"].get("base"), stage["init_from"]
        if named is not None:
            return Path(named), None
        if before is None:
            break  # it began as random weights, which nobody wants to be compared with
        place = Path(before["path"]), before["step"]
    return place


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names a checkpoint by its files' names and sizes (Orbax draws names at random) and its meta; reads no arrays."""
    files = sorted(path for path in (checkpoint.path / "params").rglob("*") if path.is_file())
    listed = [[str(path.relative_to(checkpoint.path)), path.stat().st_size] for path in files]
    return digest([checkpoint.meta.model_dump(mode="json"), listed])
