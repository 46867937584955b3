"""What files are, by their contents: a digest of a file, of a directory, of a run."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tlite_jax.config import digest

# Of a run, what those that follow it read: no optimizer, no metrics, no plots.
_OF_A_RUN = ("tokenizer",)
_OF_A_CHECKPOINT = ("meta", "params")


class Hashes:
    """SHA-256 of files, each read once: while path, size, time of change and inode stay, the file is not read again.

    Args:
      path: where digests are kept; a file that cannot be read is begun anew.
      fresh: reads every file, whatever was kept.
    """

    def __init__(self, path: Path, *, fresh: bool = False):
        self._path, self._fresh, self._changed = path, fresh, False
        self._kept: dict[str, list[int | str]] = {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            self._kept = values if isinstance(values, dict) else {}
        except (OSError, ValueError):
            pass
        self._read_now: set[str] = set()

    def of_file(self, path: Path) -> str:
        """Hexadecimal digits of a file's SHA-256."""
        status, key = path.stat(), str(path.absolute())
        stamp: list[int | str] = [status.st_size, status.st_mtime_ns, status.st_ino]
        kept = self._kept.get(key)
        trusted = not self._fresh or key in self._read_now
        if trusted and isinstance(kept, list) and kept[:3] == stamp and len(kept) == 4:
            return str(kept[3])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        self._kept[key], self._changed = [*stamp, found], True
        self._read_now.add(key)
        return found

    def of(self, path: Path) -> str | None:
        """16 digits that stand for the contents of a file, a directory, buckets or a run; None where nothing is.

        Buckets are known by their manifest, which holds checksums, and their files' sizes; a run by its newest
        checkpoint's parameters and its tokenizer.
        """
        if path.is_file():
            return self.of_file(path)[:16]
        if not path.is_dir():
            return None
        if (path / "checkpoints").is_dir():
            return self._of_run(path)
        files = list(_files(path))
        if not files:
            return None
        manifest = path / "manifest.json"
        if manifest.is_file():
            sizes = [[str(file.relative_to(path)), file.stat().st_size] for file in files]
            return digest([self.of_file(manifest), sizes])
        return self._of_files(path, files)

    def moved(self, before: Path, now: Path) -> None:
        """Keeps what is known of the files of a directory that has been renamed."""
        prefix = f"{before.absolute()}/"
        for key in [key for key in self._kept if key.startswith(prefix)]:
            new = f"{now.absolute()}/{key.removeprefix(prefix)}"
            self._kept[new], self._changed = self._kept.pop(key), True
            if key in self._read_now:
                self._read_now.add(new)

    def save(self) -> None:
        """Keeps the digests for the next start."""
        if self._changed:
            write_json(self._path, self._kept)
            self._changed = False

    def _of_files(self, root: Path, files: list[Path]) -> str:
        return digest([[str(file.relative_to(root)), self.of_file(file)] for file in files])

    def _of_run(self, run: Path) -> str | None:
        step = newest_step(run)
        if step is None:
            return None
        checkpoint = run / "checkpoints" / str(step)
        places = [run / name for name in _OF_A_RUN] + [checkpoint / name for name in _OF_A_CHECKPOINT]
        files = [file for place in places if place.is_dir() for file in _files(place)]
        return digest([step, self._of_files(run, files)])


def newest_step(run: Path) -> int | None:
    """Of a run's checkpoints."""
    names = [entry.name for entry in (run / "checkpoints").glob("*") if entry.is_dir()]
    return max((int(name) for name in names if name.isascii() and name.isdecimal()), default=None)


def _files(directory: Path) -> Iterator[Path]:
    yield from sorted(path for path in directory.rglob("*") if path.is_file())


def write_json(path: Path, values: object) -> None:
    """Whole or not at all, and on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(values, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
