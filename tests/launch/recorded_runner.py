"""Commands that leave what theirs would leave, in no time: a digest of what they read. Each is written down."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from launch.recipe_parts.process import Runner
from tests.release.made_result import made_result
from tlite_jax.recipe.graph import Arrow
from tlite_jax.release.result import save


class RecordedRunner(Runner):
    """Stands in for processes; what a recipe decides, keeps, moves and sets aside is its own.

    Attributes:
      arrows: of the recipe, to know what a command makes.
      ran: names of the arrows whose commands ran, in their order.
      stop_at: the arrow during which a signal comes, when half of what it makes is there.
      fail_at: the arrow that ends with 1.
    """

    arrows: dict[tuple[str, ...], Arrow]
    ran: list[str]
    stop_at: str | None
    fail_at: str | None

    def __init__(self, lock: IO[str], show: IO[str]):
        super().__init__(lock, show)
        type(self).ran = []

    def run(self, words: Sequence[str], log: Path, stdout: Path | None = None) -> int:
        """Makes what the command would."""
        arrow = self.arrows[tuple(word for word in words if word != "--force")]
        self.ran.append(arrow.name)
        if arrow.name == self.fail_at:
            return 1
        halfway = arrow.name == self.stop_at
        for path in arrow.makes:
            _make(arrow, path, halfway=halfway)
        if halfway:
            self.signal = 15
            return 143
        return 0


def _make(arrow: Arrow, path: Path, *, halfway: bool) -> None:
    content = _digest(arrow)
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrow.kind in ("import", "train"):
        _make_run(path, 0 if arrow.kind == "import" else 2 if halfway else 4, content)
    elif arrow.kind == "prepare":
        _write(path / "a.bucket", content)
        if not halfway:
            _write(path / "manifest.json", content)
    elif arrow.kind == "gate":
        if not halfway:
            save(made_result().model_copy(update={"recipe_hash": content}), path.parent)
    elif path.suffix in (".json", ".md"):
        scratch = path.with_name(f"{path.name}.partial")
        _write(scratch, content)
        if not halfway:
            scratch.replace(path)
    else:
        assert halfway or not path.exists(), f"{path} is in the way"
        _write(path / "model", content[: 8 if halfway else None])


def _make_run(run: Path, step: int, content: str) -> None:
    meta: dict[str, Any] = {"origin": "a test"}
    _write(run / "checkpoints" / str(step) / "meta" / "metadata", json.dumps(meta))
    _write(run / "checkpoints" / str(step) / "params" / "d", content)


def _digest(arrow: Arrow) -> str:
    """Of the command's values and of all files that it reads."""
    digest = hashlib.sha256(repr(sorted(arrow.values.items())).encode())
    for read in map(Path, arrow.reads):
        for file in [read] if read.is_file() else sorted(path for path in read.rglob("*") if path.is_file()):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def forget(directory: Path) -> None:
    """Removes what a recipe has made."""
    for name in ("out", "base", "buckets", "stage1", "stage2"):
        shutil.rmtree(directory / name, ignore_errors=True)
