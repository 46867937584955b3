"""Jobs of two processes on two hosts, whose network is cut: both must end by themselves with 76 within 15 seconds.

    python -m tests.faults.network --count 3 --seed 1

Hosts are network namespaces joined by a pair of veth devices, with files of hosts of their own (gloo looks its own
name up). `down` takes the link away; `lost` sends every packet of one host to nobody, which no one is told of. Needs
root and `ip` (iproute2). Namespaces are called tlite-PID-0 and -1, and removed at the end.
"""

import argparse
import ctypes
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import lost, report

ADDRESSES = ("10.231.17.1", "10.231.17.2")
PORT = 61917
NEW_NETWORK, NEW_MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET, CLONE_NEWNS of <sched.h>
CUTS = {
    "down": "ip -n {space} link set {device} down",
    "lost": "ip -n {space} neighbour replace {other} lladdr 02:00:00:00:00:99 nud permanent dev {device}",
}


def why_not() -> str | None:
    """What this machine lacks for network namespaces, or None."""
    missing = [tool for tool in ("ip", "mount") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"tlite-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "no network namespaces here (ip netns add)"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Hosts:
    """Two namespaces, each with an address of its own.

    Args:
      scratch: for their files of hosts.
    """

    def __init__(self, scratch: Path) -> None:
        self.spaces = [f"tlite-{os.getpid()}-{number}" for number in range(2)]
        self.devices = [f"tl{os.getpid() % 10**6}-{number}" for number in range(2)]
        self._files = [scratch / f"hosts{number}" for number in range(2)]
        for address, file in zip(ADDRESSES, self._files, strict=True):
            file.write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")

    def __enter__(self) -> "Hosts":
        try:
            for space in self.spaces:
                run(f"ip netns add {space}")
            run(f"ip link add {self.devices[0]} type veth peer name {self.devices[1]}")
            for space, device, address in zip(self.spaces, self.devices, ADDRESSES, strict=True):
                run(f"ip link set {device} netns {space}")
                run(f"ip -n {space} address add {address}/24 dev {device}")
                run(f"ip -n {space} link set {device} up")
                run(f"ip -n {space} link set lo up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self.spaces:  # their devices go with them
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def move_in(self, number: int) -> None:
        """Makes this process, which must have one thread only, one of a host's."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.spaces[number]}") as space:
            if libc.setns(space.fileno(), NEW_NETWORK) or libc.unshare(NEW_MOUNTS):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        run("mount --make-rprivate /")
        run(f"mount --bind {self._files[number]} /etc/hosts")

    def cut(self, kind: str, number: int) -> None:
        """Cuts the network at a host."""
        run(CUTS[kind].format(space=self.spaces[number], device=self.devices[number], other=ADDRESSES[1 - number]))


def run(command: str) -> None:
    """Runs words of a command; raises CalledProcessError."""
    subprocess.run(command.split(), check=True, capture_output=True)


@contextmanager
def _job(stage: lost.Stage, hosts: Hosts) -> Iterator[lost.Job]:
    inside = {number: lambda number=number: hosts.move_in(number) for number in range(2)}
    job = stage.job(inside, processes=2, coordinator=f"{ADDRESSES[0]}:{PORT}")
    try:
        yield job
    finally:
        job.end()


def suffer(stage: lost.Stage, scratch: Path, kind: str, chance: np.random.Generator) -> dict[str, Any]:
    """One job, one cut; returns when both ended and what they said.

    Raises:
      AssertionError: one of them did not end with 76 in time.
    """
    with Hosts(scratch) as hosts, _job(stage, hosts) as job:
        job.wait_for(lambda: stage.has_trained(2))
        time.sleep(float(chance.random()))
        hosts.cut(kind, int(chance.integers(2)))
        since = time.monotonic()
        ended = job.wait([0, 1], since + lost.GONE_SECONDS)
        assert [status for status, _ in ended.values()] == [lost.RESTART] * 2, f"{kind}: {ended}\n{job.said()}"
        seconds = {number: round(at - (since - job.began), 2) for number, (_, at) in ended.items()}
        return {"cut": kind, "ended_after": seconds, "said": lost.why(job, [0, 1])}


def main() -> None:
    """Cuts networks and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"not tried: {reason}")
        return
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="tlite-network-") as scratch:
        stage = lost.Stage(Path(scratch))
        for number in range(arguments.count):
            for kind in CUTS:
                found = suffer(stage, Path(scratch), kind, np.random.default_rng([arguments.seed, number]))
                worst = max(found["ended_after"].values())
                slowest = max(slowest, worst)
                report.tell(kind, worst=worst, limit=lost.GONE_SECONDS)
                print(json.dumps({"number": number, **found}), flush=True)
    print(f"{arguments.count} x {len(CUTS)} networks cut: all processes ended with 76, the slowest in {slowest:.1f} s")


if __name__ == "__main__":
    main()
