"""What checking a thing on disk found; shared by the verifiers of buckets, checkpoints, HF directories, GGUF files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Progress = Callable[[str, int, int], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes:
      file: path, relative to what was verified.
      problem: one line.
      offset: first byte in doubt; None where a place says nothing (a file that is missing).
      bytes: how many bytes from there are in doubt.
    """

    file: str
    problem: str
    offset: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        """One line for people."""
        if self.offset is None:
            return f"{self.file}: {self.problem}"
        span = f"from byte {self.offset}" if self.bytes is None else f"bytes {self.offset}..{self.offset + self.bytes}"
        return f"{self.file}: {span}: {self.problem}"


@dataclass(frozen=True)
class Verification:
    """The outcome: intact when there is no damage.

    Attributes:
      kind: what the path was taken for.
      path: what was verified.
      files, bytes: how much was read and compared.
      checked: one line that says against what.
      damages: all that was found.
      unchecked: files there that nothing vouches for.
    """

    kind: str
    path: Path
    files: int
    bytes: int
    checked: str
    damages: tuple[Damage, ...] = ()
    unchecked: tuple[str, ...] = ()
