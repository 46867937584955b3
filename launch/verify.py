"""`python -m launch verify PATH`: is a thing on disk as it was written, and if not, where."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.verification import Progress, Verification

EXIT_DAMAGED = 1


class Kind(NamedTuple):
    """A kind of thing: how it is told by its outside, and what checks it."""

    name: str
    matches: Callable[[Path], bool]
    verify: "Callable[[Path, Progress | None], Verification]"


def main(
    path: Annotated[
        Path, typer.Argument(help="A run, one of its checkpoints, buckets, a release, an HF directory, GGUF files.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Read every byte of PATH and compare it with the checksums that were written with it.

    Ends with 0 when all is intact, 1 when something is damaged (each place is listed), 2 when PATH is nothing it knows.

    Example: python -m launch verify runs/tiny/buckets
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    kind = kind_of(path)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=console, disable=as_json or not console.is_terminal) as bar:
        task = bar.add_task("verifying")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = kind.verify(path, show)
    if as_json:
        values = {**asdict(found), "path": str(found.path), "intact": not found.damages}
        print(json.dumps(values, ensure_ascii=False, indent=1))
    else:
        _print(found)
    if found.damages:
        raise typer.Exit(EXIT_DAMAGED)


def kind_of(path: Path) -> Kind:
    """What a path is, told by the names there.

    Raises:
      UserError: nothing there, or nothing that can be verified.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    for kind in KINDS:
        if kind.matches(path):
            return kind
    raise UserError(f"{path} is none of: {', '.join(kind.name for kind in KINDS)}; give one of these")


def _print(found: "Verification") -> None:
    for damage in found.damages:
        print(f"damaged: {damage}")
    for name in found.unchecked:
        print(f"not checked: {name}: no checksum of the {found.kind} speaks of it")
    read = f"{found.files:,} files, {found.bytes:,} bytes"
    if found.damages:
        print(f"{found.path}: {found.kind}: {len(found.damages):,} damaged places in {read}")
    else:
        print(f"{found.path}: {found.kind}, intact: {read}; {found.checked}")


def _is_buckets(path: Path) -> bool:
    from tlite_jax.data.verify import is_buckets

    return is_buckets(path)


def _verify_buckets(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.data.verify import verify_buckets

    return verify_buckets(path, progress)


def _is_release(path: Path) -> bool:
    return path.is_dir() and (path / "release.json").is_file()


def _verify_release(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.release.verify import verify_release

    return verify_release(path, progress)


def _is_hf_directory(path: Path) -> bool:
    from tlite_jax.bridge.verify import is_hf_directory

    return is_hf_directory(path)


def _verify_hf(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.bridge.verify import verify_hf

    return verify_hf(path, progress)


def _is_gguf(path: Path) -> bool:
    from tlite_jax.bridge.verify import is_gguf

    return is_gguf(path)


def _verify_gguf(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.bridge.verify import verify_gguf

    return verify_gguf(path, progress)


def _is_checkpoint(path: Path) -> bool:
    from tlite_jax.checkpoint.verify import is_checkpoint

    return is_checkpoint(path)


def _verify_checkpoint(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.checkpoint.verify import verify_checkpoint

    return verify_checkpoint(path, progress)


def _is_run(path: Path) -> bool:
    from tlite_jax.checkpoint.verify import is_run

    return is_run(path)


def _verify_run(path: Path, progress: "Progress | None") -> "Verification":
    from tlite_jax.checkpoint.verify import verify_run

    return verify_run(path, progress)


# The first that matches is taken: those with the surer marks come first.
KINDS = [
    Kind("a checkpoint", _is_checkpoint, _verify_checkpoint),
    Kind("a run", _is_run, _verify_run),
    Kind("buckets", _is_buckets, _verify_buckets),
    Kind("a release", _is_release, _verify_release),
    Kind("an HF directory", _is_hf_directory, _verify_hf),
    Kind("a GGUF file", _is_gguf, _verify_gguf),
]
