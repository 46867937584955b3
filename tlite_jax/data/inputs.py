"""Input files, local or behind a URL that fsspec opens (s3://, gs://, hf://, memory://, file:// ...).

A file is known by what would change with its content: size and modification time, or what the remote file system
names the content by. Whoever reads it checks that it is still the file that was listed.
"""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from tlite_jax.config import SourceConfig
from tlite_jax.errors import UserError

Format = Literal["jsonl", "parquet", "text"]

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
_COMPRESSIONS = {".zst": "zstd", ".gz": "gzip"}
# What file systems tell of a file's content, the surest first.
_VERSIONS = ("ETag", "etag", "md5Hash", "checksum", "Content-MD5", "Digest", "blob_id", "generation", "VersionId")
_TIMES = ("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created")
# Protocol -> the extra of ours that installs its package.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class InputFile:
    """A file as it was found: whatever of this changes makes it another input.

    Attributes:
      path: a local path or a URL.
      modified_ns: of a local file, 0 behind a URL.
      version: what a remote file system says of the content, empty for a local file.
      ranges: whether it can be read from anywhere; some web servers send files from the beginning only.
    """

    path: str
    format: Format
    compression: str | None
    bytes: int
    modified_ns: int
    version: str = ""
    ranges: bool = True

    def identity(self) -> dict[str, Any]:
        """What the prepare hash knows of the file; its directory may change."""
        state = {"version": self.version} if is_url(self.path) else {"modified_ns": self.modified_ns}
        return {"name": os.path.basename(self.path), "bytes": self.bytes, **state}


def is_url(path: str) -> bool:
    """Whether fsspec is to open it."""
    return "://" in path


def find_files(source: SourceConfig) -> list[InputFile]:
    """Resolves a source's paths, URLs and glob patterns, each file once, patterns sorted.

    Raises:
      UserError: nothing matches, a directory, an unreadable file, a format that cannot be told, a protocol whose
        package is not installed.
    """
    found: dict[str, InputFile] = {}
    for pattern in source.paths:
        for file in _remote_files(source, pattern) if is_url(pattern) else _local_files(source, pattern):
            found.setdefault(file.path, file)
    return list(found.values())


def open_input(file: InputFile) -> BinaryIO:
    """Opens a file's bytes as they are stored, having checked that it is the one that was found.

    Raises:
      UserError: changed, or gone.
    """
    try:
        if not is_url(file.path):
            status = os.stat(file.path)
            _check_unchanged(file, status.st_size, str(status.st_mtime_ns))
            return open(file.path, "rb")
        filesystem, path = _filesystem(file.path)
        info = filesystem.info(path)
        _check_unchanged(file, info["size"], _version(filesystem, path, info))
        return cast(BinaryIO, filesystem.open(path, "rb", block_size=_BLOCK_BYTES if file.ranges else 0))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {file.path}: {_reason(error)}; start again when it can be read") from error


def _check_unchanged(file: InputFile, size: int, version: str) -> None:
    if (size, version) != (file.bytes, file.version or str(file.modified_ns)):
        raise UserError(f"{file.path} changed while it was prepared; start again when it is whole")


def _local_files(source: SourceConfig, pattern: str) -> Iterator[InputFile]:
    expanded = os.path.expanduser(pattern)
    is_pattern = glob.has_magic(expanded) and not os.path.exists(expanded)
    paths = sorted(glob.glob(expanded, recursive=True)) if is_pattern else [expanded]
    files = [path for path in paths if not os.path.isdir(path)] if is_pattern else paths
    if not files:
        raise UserError(f"source {source.name}: no file matches {pattern}")
    for path in files:
        if os.path.isdir(path):
            raise _directory(source, path)
        try:
            status = os.stat(path)
            with open(path, "rb"):
                pass
        except OSError as error:
            raise UserError(f"source {source.name}: cannot read {path}: {error.strerror}") from error
        yield InputFile(path, *_form(source, path), status.st_size, status.st_mtime_ns)


def _remote_files(source: SourceConfig, pattern: str) -> Iterator[InputFile]:
    try:
        filesystem, path = _filesystem(pattern)
        # In an http address a question mark begins the query.
        is_pattern = "*" in path or (glob.has_magic(path) and not pattern.startswith("http"))
        paths = sorted(filesystem.glob(path)) if is_pattern else [path]
        infos = [(path, filesystem.info(path)) for path in paths]
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from error
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"source {source.name}: cannot read {pattern}: {_reason(error)}") from error
    files = [(path, info) for path, info in infos if info["type"] != "directory"]
    if not files:
        if infos:
            raise _directory(source, pattern)
        raise UserError(f"source {source.name}: no file matches {pattern}")
    for path, info in files:
        url = filesystem.unstrip_protocol(path)
        if info.get("size") is None:
            raise UserError(f"source {source.name}: {url} does not tell its size; download it first")
        form, compression = _form(source, url.split("?")[0])
        ranges = not url.startswith("http") or bool(info.get("partial"))
        if form == "parquet" and not ranges:
            raise UserError(f"source {source.name}: {url} is sent from its beginning only; download it first")
        version = _version(filesystem, path, info)
        yield InputFile(url, form, compression, int(info["size"]), 0, version, ranges)


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system behind a URL, and the path there."""
    import fsspec  # slow to import, and not always used

    if "::" in url:
        raise UserError(f"{url}: chained URLs are not read; name the file itself")
    protocol = url.split("://")[0]
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        mend = f"pip install 'tlite_jax[{extra}]'" if extra else _reason(error)
        raise UserError(f"{protocol}:// needs a package that is not installed: {mend}") from error
    except ValueError as error:
        raise UserError(f"cannot read {url}: {_reason(error)}") from error


def _version(filesystem: Any, path: str, info: dict[str, Any]) -> str:
    for key in (*_VERSIONS, *_TIMES):
        if info.get(key) is not None:
            return f"{key}={info[key]}"
    return f"ukey={filesystem.ukey(path)}"


def _form(source: SourceConfig, path: str) -> tuple[Format, str | None]:
    """Format and compression of a file."""
    name = PurePosixPath(path)
    compression = _COMPRESSIONS.get(name.suffix)
    suffix = PurePosixPath(name.stem).suffix if compression else name.suffix
    form = _FORMATS.get(suffix) if source.format == "auto" else source.format
    if form is None:
        raise UserError(f"source {source.name}: cannot tell the format of {path} by its suffix; set its format")
    if form == "parquet" and compression:
        raise UserError(f"source {source.name}: {path}: a compressed parquet file; decompress it")
    return cast(Format, form), compression


def _directory(source: SourceConfig, path: str) -> UserError:
    pattern = f"{path.rstrip('/')}/*.jsonl"
    return UserError(f"source {source.name}: {path} is a directory; give a pattern such as {pattern}")


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().splitlines()[0].rstrip(".")
