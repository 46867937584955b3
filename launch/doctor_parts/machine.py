"""Devices, disks, clocks and the network of this machine."""

import os
import shutil
import socket
import struct
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from launch.doctor_parts.findings import Finding, ok

DISK_BYTES, CHUNK, DISK_SECONDS = 2**28, 2**24, 3.0
NTP_EPOCH = 2_208_988_800  # seconds from 1900 to 1970
MOST_OFFSET = 0.5  # seconds
NETWORK_SECONDS = 5.0
SLOW_SAVE_SECONDS = 120  # if this machine wrote a checkpoint alone


def check_devices(num_gpus: int) -> list[Finding]:
    """What jax computes on, with its memory; `num_gpus` are here by the driver."""
    import jax

    devices = jax.devices()
    first = jax.local_devices()[0]
    memory = (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    said = f"{len(devices)} x {first.device_kind} ({first.platform}) in {jax.process_count()} processes"
    said += f", {memory / 2**30:.1f} GiB each for jax" if memory else ""
    if first.platform == "cpu" and num_gpus:
        mend = "JAX_PLATFORMS=cuda,cpu makes jax say why; see driver above"
        return [Finding("devices", "fail", f"{said}, though {num_gpus} GPUs are here", mend)]
    if num_gpus and len(jax.local_devices()) * jax.process_count() < num_gpus:
        message = f"{said}: {len(jax.local_devices())} of this machine's {num_gpus} GPUs in this process"
        return [Finding("devices", "warn", message, "CUDA_VISIBLE_DEVICES or the scheduler hides the others")]
    return [ok("devices", said)]


def check_disk(directory: Path, checkpoint_bytes: int | None, num_kept: int) -> list[Finding]:
    """Bandwidth of the disk that a run would write to, and its room for the checkpoints that a run keeps.

    Args:
      directory: need not exist yet.
      checkpoint_bytes: of one, where a config says so.
      num_kept: checkpoints that exist at once, the one being written included.
    """
    place = directory.resolve()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    findings = []
    if checkpoint_bytes is not None:
        needed = num_kept * checkpoint_bytes
        said = f"{free / 1e9:.1f} GB free at {place}, {num_kept} checkpoints take {needed / 1e9:.2f}"
        mend = "another output, or fewer: checkpoint.keep_latest, checkpoint.keep_every"
        findings.append(ok("space", said) if free > needed else Finding("space", "fail", said, mend))
    elif free < 2 * DISK_BYTES:
        return [Finding("space", "fail", f"{free / 1e6:.0f} MB free at {place}", "free some, or use another directory")]
    if free < 2 * DISK_BYTES:
        return findings
    try:
        written, read = disk_rates(place, DISK_BYTES)
    except OSError as error:
        return [*findings, Finding("disk", "fail", f"cannot write to {place}: {error.strerror}", "another output")]
    said = f"{place}: writes {written / 1e6:,.0f} MB/s with fsync, reads {read / 1e6:,.0f} MB/s"
    if checkpoint_bytes is not None:
        said += (
            f"; a checkpoint of {checkpoint_bytes / 1e9:.2f} GB in {checkpoint_bytes / written:,.1f} s from one machine"
        )
    if checkpoint_bytes is not None and checkpoint_bytes / written > SLOW_SAVE_SECONDS:
        return [*findings, Finding("disk", "warn", said, "a faster file system for output; checkpoint.every larger")]
    return [*findings, ok("disk", said)]


def disk_rates(directory: Path, num_bytes: int) -> tuple[float, float]:
    """(written and fsynced, read) bytes/s of a file that is deleted again; at most some seconds of each."""
    chunk = os.urandom(CHUNK)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".doctor-", buffering=0) as file:
        began, size = time.monotonic(), 0
        while size < num_bytes and time.monotonic() - began < DISK_SECONDS:
            size += file.write(chunk)
        os.fsync(file.fileno())
        write_seconds = time.monotonic() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else the page cache is what answers
        file.seek(0)
        began, read = time.monotonic(), 0
        while (part := file.read(CHUNK)) and time.monotonic() - began < DISK_SECONDS:
            read += len(part)
        return size / write_seconds, read / max(time.monotonic() - began, 1e-9)


def check_clocks() -> list[Finding]:
    """The clocks of all processes against each other; every process takes part."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return []
    multihost_utils.sync_global_devices("clock")
    now = time.time()  # float32 would round it to minutes
    clocks = multihost_utils.process_allgather(np.asarray([int(now), int(now % 1 * 1e6)], np.int32))
    seconds = [int(whole) + int(millionths) / 1e6 for whole, millionths in np.reshape(clocks, (-1, 2))]
    spread = max(seconds) - min(seconds)
    said = f"clocks of {len(seconds)} processes agree to {spread:.3f} s"
    if spread < MOST_OFFSET:
        return [ok("clock", said)]
    last = int(np.argmax(np.abs(np.asarray(seconds) - np.median(seconds))))
    return [Finding("clock", "warn", f"{said}; process {last} is farthest off", "run chrony or ntpd on all nodes")]


def ntp_offset(server: str = "pool.ntp.org", timeout: float = 2.0) -> float | None:
    """How far this clock is ahead of a time server's, seconds (RFC 4330); None where none is reached."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(timeout)
            sent = time.time()
            client.sendto(b"\x1b" + 47 * b"\0", (server, 123))
            answer = client.recv(48)
    except OSError:
        return None
    if len(answer) < 48:
        return None
    whole, fraction = struct.unpack("!II", answer[40:48])
    return (sent + time.time()) / 2 - (whole - NTP_EPOCH + fraction / 2**32)


def judge_ntp(offset: float | None) -> Finding:
    """What an offset means."""
    if offset is None:
        return ok("clock", "no time server reached: not compared")
    said = f"{abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} pool.ntp.org"
    if abs(offset) < MOST_OFFSET:
        return ok("clock", said)
    return Finding("clock", "warn", said, "run chrony or ntpd")


def hub_problem() -> str | None:
    """Why the Hugging Face hub is not reached; None when it is."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(f"{endpoint}/api/models?limit=1", method="HEAD")
        with urllib.request.urlopen(request, timeout=NETWORK_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{endpoint}: {getattr(error, 'reason', error)}"


def judge_hub(problem: str | None) -> Finding:
    """What an unreachable hub means."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return ok("hub", "HF_HUB_OFFLINE is set: not asked")
    if problem is None:
        return ok("hub", "Hugging Face answers")
    mend = "import from a directory copied here, or set HF_ENDPOINT to a mirror"
    return Finding("hub", "warn", f"not reached: {problem}", mend)


class Network:
    """Asks the time server and the hub while others compute: names that nobody resolves take their time."""

    def __init__(self, ntp: Callable[[], float | None] = ntp_offset, hub: Callable[[], str | None] = hub_problem):
        self._pool = ThreadPoolExecutor(2)
        self._ntp: Future[float | None] = self._pool.submit(ntp)
        self._hub: Future[str | None] = self._pool.submit(hub)

    def findings(self) -> list[Finding]:
        """What came back in time."""
        try:
            offset = self._ntp.result(NETWORK_SECONDS)
        except FutureTimeoutError:
            offset = None
        try:
            problem = self._hub.result(NETWORK_SECONDS)
        except FutureTimeoutError:
            problem = f"no answer in {NETWORK_SECONDS:.0f} s"
        self._pool.shutdown(wait=False, cancel_futures=True)
        return [judge_ntp(offset), judge_hub(problem)]
