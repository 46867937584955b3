"""Where the parts of a run's checkpoints lie on the local disks of its hosts.

    LOCAL_DIR/RUN-...-ID/process-N/STEP     what process N has of a checkpoint, sealed as a whole one is

RUN/local.json has the ID. It names the processes and devices, too: parts are of use to the very same ones. When the run
goes back, the file is deleted, and with it all parts are forgotten; so they are when the run's directory is.
"""

import contextlib
import secrets
import shutil
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh

from tlite_jax.checkpoint.peers import new_talk
from tlite_jax.checkpoint.stored import is_step
from tlite_jax.config import digest
from tlite_jax.data.files import read_json, write_json
from tlite_jax.errors import UserError

RECORD = "local.json"


def parts_of(run: Path, local_dir: Path, mesh: Mesh) -> Path | None:
    """The directory of this process's parts; None when the run has none of this mesh. All processes call it."""

    def decide(words: list[str]) -> str:
        record = _read(run)
        if record and record["layout"] != _layout(mesh):
            told = "local checkpoints are not used: they are of another mesh or other processes"
            print(f"warning: {run}: {told}", file=sys.stderr, flush=True)
            return ""
        return record.get("id", "")

    name = new_talk("local").meet("id", decide=decide)
    return _directory(run, local_dir, name) if name else None


def claim_parts(run: Path, local_dir: Path, mesh: Mesh) -> Path:
    """The same for a run that is going to save; parts of another mesh, or that are forgotten, are deleted."""

    def decide(words: list[str]) -> str:
        record = _read(run)
        if record.get("layout") != _layout(mesh):
            record = {"id": secrets.token_hex(8), "layout": _layout(mesh)}
            write_json(run / RECORD, record)
        return record["id"]

    directory = _directory(run, local_dir, new_talk("local").meet("claim", decide=decide))
    with contextlib.suppress(OSError):  # a disk that fails is told of when it is to be written
        for other in local_dir.iterdir():
            if other.name.startswith(_prefix(run)) and other.name != directory.parent.name:
                shutil.rmtree(other, ignore_errors=True)
    return directory


def forget_parts(run: Path) -> None:
    """Whatever lies on local disks is not this run's any more."""
    (run / RECORD).unlink(missing_ok=True)


def steps_of(parts: Path) -> list[int]:
    """The steps that this process has its part of, ascending."""
    try:
        return sorted(int(entry.name) for entry in parts.iterdir() if is_step(entry.name) and entry.is_dir())
    except OSError:
        return []


def drop_after(parts: Path, step: int) -> None:
    """Deletes the parts of later steps than the one that the run goes on from."""
    for later in steps_of(parts):
        if later > step:
            drop(parts / str(later))


def drop(directory: Path) -> None:
    """Deletes a part; renamed first, so that a half-deleted one is never taken for whole."""
    with contextlib.suppress(OSError):
        doomed = directory.with_name(f"{directory.name}.deleting")
        directory.rename(doomed)
        shutil.rmtree(doomed)


def _read(run: Path) -> dict[str, str]:
    try:
        return read_json(run / RECORD)
    except UserError:
        return {}


def _layout(mesh: Mesh) -> str:
    devices = [[device.process_index, device.id] for device in mesh.devices.flat]
    return digest({"shape": dict(mesh.shape), "devices": devices})


def _directory(run: Path, local_dir: Path, name: str) -> Path:
    return local_dir.absolute() / f"{_prefix(run)}{name}" / f"process-{jax.process_index()}"


def _prefix(run: Path) -> str:
    return f"{run.absolute().name}-{digest({'run': str(run.absolute())})[:8]}-"
