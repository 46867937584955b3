"""Files of Debian packages, without being root and without installing anything."""

import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

DOWNLOAD_SECONDS = 90
MAX_FILE_BYTES = 4_000_000
_APT_OPTIONS = ("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15", "-o", "Acquire::https::Timeout=15")


class UnavailableError(Exception):
    """Debian packages cannot be had here; the message says why."""


def download(packages: Sequence[str], directory: Path) -> dict[str, Path]:
    """Downloads packages with `apt-get download`, which checks their signatures.

    Args:
      packages: names; those that this release of Debian or Ubuntu does not have are left out.
      directory: where the .deb files go.

    Returns:
      Name -> .deb file.

    Raises:
      UnavailableError: no apt-get, no package of these, or a download failed.
    """
    policy = _run(["apt-cache", "policy", *packages], directory, seconds=30)
    available = re.findall(r"^(\S+):\n.*\n  Candidate: (?!\(none\))", policy, re.MULTILINE)
    if not available:
        raise UnavailableError("apt knows none of the packages; `apt-get update` may mend that")
    _run(["apt-get", *_APT_OPTIONS, "download", *available], directory, seconds=DOWNLOAD_SECONDS)
    found = {path.name.split("_")[0]: path for path in sorted(directory.glob("*.deb"))}
    if missing := sorted(set(available) - found.keys()):
        raise UnavailableError(f"not downloaded: {', '.join(missing)}")
    return found


def read_files(package: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Reads regular files out of a .deb; nothing is written to disk.

    Args:
      package: the .deb file.
      pattern: regular expression that a whole path, without the leading "./", matches.

    Yields:
      Path and content. Links and files above 4 MB are left out.

    Raises:
      UnavailableError: dpkg-deb is absent or cannot read the package.
    """
    try:
        with (
            subprocess.Popen(
                ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isfile() and member.size <= MAX_FILE_BYTES and re.fullmatch(pattern, name):
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file has content"
                    yield name, file.read()
    except (OSError, tarfile.TarError) as error:
        raise UnavailableError(f"dpkg-deb cannot read {package.name}: {error}") from error


def _run(command: list[str], directory: Path, *, seconds: float) -> str:
    """Runs a command quietly in C locale; returns what it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        raise UnavailableError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{command[0]} took longer than {seconds:g} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise UnavailableError(" ".join((lines or done.stderr.splitlines() or ["no reason given"])[-1].split()))
    return done.stdout
