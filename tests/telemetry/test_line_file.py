"""Lines on a disk that is full for a while."""

import errno
from pathlib import Path

import pytest

from tlite_jax.telemetry.line_file import LineFile


class Disk:
    """A raw file with so much room."""

    def __init__(self, file, room: int) -> None:
        self._file, self.room, self.error = file, room, errno.ENOSPC

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(self.error, "No space left on device")
        written = self._file.write(content[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def test_what_had_no_room_follows_in_order(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = LineFile(tmp_path / "lines")
    disk = file._file = Disk(file._file, 7)
    for number in range(4):
        file.write(b"line%d\n" % number)  # the second is torn
    assert (tmp_path / "lines").read_bytes() == b"line0\nl"
    assert len(capsys.readouterr().err.splitlines()) == 1
    disk.room = 100
    file.write(b"line4\n")
    assert (tmp_path / "lines").read_bytes() == b"line0\nline1\nline2\nline3\nline4\n"
    disk.room = 0
    file.write(b"line5\n")
    with pytest.raises(OSError, match="No space left"):
        file.close()
    assert file.closed
    file.close()


def test_another_error_is_raised(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    disk = file._file = Disk(file._file, 0)
    disk.error = errno.EIO
    with pytest.raises(OSError, match="No space"):
        file.write(b"line\n")
