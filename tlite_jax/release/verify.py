"""A release directory, or a downloaded repository of one: intact, or exactly what is wrong."""

import os
from collections.abc import Iterator
from pathlib import Path

from tlite_jax.bridge.checksums import SUFFIX, SUMS_NAME, read_sums, sha256_of
from tlite_jax.bridge.files import contained, shown
from tlite_jax.bridge.verify import HF_KIND, is_gguf, is_hf_directory, verify_gguf, verify_hf
from tlite_jax.errors import UserError
from tlite_jax.release.hub import is_inside, unread_weights
from tlite_jax.release.result import FILE_NAME, ReleaseResult, load
from tlite_jax.verification import Damage, Progress, Verification

KIND = "release"


def _sums(place: Path, name: str) -> dict[str, str]:
    """Of a checksum file; what is wrong with it, its directory's verifier has said."""
    try:
        return read_sums(contained(place, name, name))
    except UserError:
        return {}


def verify_release(path: Path, progress: Progress | None = None) -> Verification:
    """Checks the model and the GGUF files as `verify_hf` and `verify_gguf`, and each file that release.json lists.

    The model may lie in hf/, as a gate leaves it, or at the top, as on the hub. Never raises for what is there.
    """
    return _Verifier(path, progress or (lambda *_: None)).run()


class _Verifier:
    def __init__(self, root: Path, progress: Progress) -> None:
        self._root, self._progress = root, progress
        self._damages: list[Damage] = []
        self._vouched: dict[str, str] = {}  # by checksum files that were held against the files
        self._read: set[str] = set()

    def run(self) -> Verification:
        parts = [part for part in (self._hf(), self._ggufs()) if part is not None]
        names = sorted(self._walk())
        result = self._result()
        listed = {} if result is None else {file.path: file.sha256 for file in result.files}
        for name, expected in listed.items():
            self._file(name, expected)
        if result is not None:
            self._judge(result, names)
        ours = {FILE_NAME, *listed, *self._read}
        sizes = [self._size(name) for name in ours & set(names)]
        checked = [*dict.fromkeys(part for found in parts for part in found.checked.split(", "))]
        return Verification(
            KIND,
            self._root,
            len(sizes),
            sum(sizes),
            ", ".join([*checked, f"every file in {FILE_NAME}"]),
            tuple(self._damages),
            tuple(name for name in names if name not in ours),
        )

    def _hf(self) -> Verification | None:
        place = next((place for place in (self._root / "hf", self._root) if is_hf_directory(place)), None)
        return None if place is None or self._leads_out(place) else self._part(place, verify_hf(place, self._progress))

    def _ggufs(self) -> Verification | None:
        place = next((place for place in (self._root / "gguf", self._root) if place.is_dir() and is_gguf(place)), None)
        if place is None or self._leads_out(place):
            return None
        return self._part(place, verify_gguf(place, self._progress))

    def _leads_out(self, place: Path) -> bool:
        outside = not place.resolve().is_relative_to(self._root.resolve())
        if outside:
            self._damage(place.name, "is a link out of the release; put the directory itself there")
        return outside

    def _part(self, place: Path, found: Verification) -> Verification:
        """Takes over what was found of a directory, under names of the release."""
        prefix = "" if place == self._root else f"{place.name}/"
        for damage in found.damages:
            self._damages.append(Damage(prefix + damage.file, damage.problem, damage.offset, damage.bytes))
        harmed = {damage.file for damage in found.damages}
        for name in sorted(os.listdir(place)):
            sums = {}
            if found.kind == HF_KIND and name == SUMS_NAME:
                sums = _sums(place, name)
            elif found.kind != HF_KIND and name.endswith(f".gguf{SUFFIX}"):
                file = name.removesuffix(SUFFIX)
                sums = {key: value for key, value in _sums(place, name).items() if key == file}
            if sums or name.endswith(".gguf"):
                self._read.add(prefix + name)
            self._vouched |= {prefix + key: value for key, value in sums.items() if key not in harmed}
        return found

    def _result(self) -> ReleaseResult | None:
        try:
            contained(self._root, FILE_NAME, FILE_NAME)
            return load(self._root)
        except UserError as error:
            self._damage(FILE_NAME, str(error).replace(f"{self._root}/", ""))
            return None

    def _file(self, name: str, expected: str) -> None:
        """Compares a listed file's hash, unless a checksum file has already vouched for the same one."""
        if any(damage.file == name for damage in self._damages):
            return
        if not is_inside(name):
            self._damage(FILE_NAME, f"lists {shown(name)}, which lies outside; a release holds its files itself")
            return
        path = self._root / name
        if not path.is_file():
            self._damage(name, f"missing; {FILE_NAME} lists it")
            return
        if self._vouched.get(name) == expected or self._leads_out(path.parent):
            return
        try:
            size = contained(path.parent, path.name, FILE_NAME).stat().st_size
            found = sha256_of(path, lambda done: self._progress("hashing", done, size))
        except UserError as error:
            self._damage(name, error)
            return
        if found != expected:
            self._damage(name, f"SHA-256 is {found}, the gate read {expected}; it is not what was checked")

    def _judge(self, result: ReleaseResult, names: list[str]) -> None:
        if not result.passed:
            stopped = ", ".join(check.name for check in result.checks if check.holds_up)
            self._damage(FILE_NAME, f"the gate has not passed: {stopped}")
        for name in unread_weights(result, names):
            if not any(damage.file == name for damage in self._damages):
                self._damage(name, "was not there when the gate read the release")

    def _walk(self) -> Iterator[str]:
        for folder, below, names in os.walk(self._root):
            below[:] = [name for name in below if not name.startswith(".")]  # git's, and the hub's client's
            for name in names:
                yield os.path.relpath(os.path.join(folder, name), self._root)

    def _size(self, name: str) -> int:
        path = self._root / name
        return path.stat().st_size if path.is_file() else 0

    def _damage(self, file: str, problem: object) -> None:
        self._damages.append(Damage(shown(file), str(problem).removeprefix(f"{file}: ")))
