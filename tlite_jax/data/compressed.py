"""Compressed streams read in bounded memory; one that is damaged gives what lies before the damage, then says so."""

import io
import zlib
from typing import Any, BinaryIO

import zstandard

_READ_BYTES = 1 << 16
# Decoded at once: zstd may turn 4 bytes into 128 KiB, gzip one byte into about 1 KiB, so either gives 4 MiB at most.
_DECODED_BYTES = {"zstd": 128, "gzip": 4096}
_ERRORS = (zlib.error, zstandard.ZstdError)


class DamagedError(Exception):
    """The input itself is broken: no retry reads more of it.

    Attributes:
      reason: what is broken, the same for all inputs broken in this way.
      detail: what the library said.
      lost_bytes: bytes of the file that could not be read.
      documents: how many documents are known to be lost; 1 where that is not known.
    """

    def __init__(self, reason: str, detail: str, lost_bytes: int, documents: int = 1) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.lost_bytes, self.documents = reason, detail, lost_bytes, documents


def decompressed(stream: BinaryIO, compression: str, size: int) -> io.BufferedReader:
    """Reads a gzip or zstd stream, of one member or frame or of several.

    Args:
      stream: the compressed bytes.
      compression: "gzip" or "zstd".
      size: how many bytes `stream` has.

    Raises (when read):
      DamagedError: after all that could be decompressed.
    """
    return io.BufferedReader(_Decompressed(stream, compression, size), 1 << 20)


class _Decompressed(io.RawIOBase):
    def __init__(self, stream: BinaryIO, compression: str, size: int) -> None:
        self._stream, self._compression, self._size = stream, compression, size
        self._input, self._output = memoryview(b""), memoryview(b"")
        self._consumed = 0
        self._decoder: Any = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not (self._input or self._fill()):
                return 0
            self._output = memoryview(self._decode())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _fill(self) -> bool:
        self._input = memoryview(self._stream.read(_READ_BYTES))
        if not self._input and self._decoder is not None:
            raise DamagedError(f"damaged {self._compression} file", "it ends early", self._size - self._consumed)
        return bool(self._input)

    def _decode(self) -> bytes:
        if self._decoder is None:
            if self._input[0] == 0 and self._compression == "gzip":  # padding around members is allowed
                self._take(1)
                return b""
            is_gzip = self._compression == "gzip"
            self._decoder = zlib.decompressobj(wbits=31) if is_gzip else zstandard.ZstdDecompressor().decompressobj()
        try:
            given = self._input[: _DECODED_BYTES[self._compression]]
            output = self._decoder.decompress(given)
        except _ERRORS as error:
            raise DamagedError(f"damaged {self._compression} file", str(error), self._size - self._consumed) from error
        self._take(len(given) - len(self._decoder.unused_data))
        if self._decoder.eof:
            self._decoder = None
        return output

    def _take(self, count: int) -> None:
        self._input = self._input[count:]
        self._consumed += count
