"""A real Slurm on one machine: a controller and four nodes in a scratch directory, none of the system's own touched.

It has its own munge, ports, state and, in a mount namespace of its own, /etc/hosts. Needs root and Debian's slurmctld,
slurmd, slurm-client and munge.

    with SlurmCluster(Path("/tmp/mini")) as cluster:
        cluster.call("srun", "-N2", "hostname")
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare")
CONFIGURATION = """
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={scratch}/munge.socket,cred_expire=10
SlurmctldPort={port}
SlurmctldPidFile={scratch}/ctld.pid
SlurmdPidFile={scratch}/slurmd.%n.pid
SlurmctldLogFile={scratch}/log/ctld.log
SlurmdLogFile={scratch}/log/slurmd.%n.log
StateSaveLocation={scratch}/ctld
SlurmdSpoolDir={scratch}/d/%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=60
NodeName=DEFAULT CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}]
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        return "no mount namespaces here (unshare --mount)"
    return None


class SlurmCluster:
    """Starts on entering, ends on leaving, and leaves nothing running."""

    def __init__(self, scratch: Path, *, nodes: int = 4, port: int = 26817):
        self.scratch, self.port = scratch, port
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "SLURM_CONF": str(scratch / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SlurmCluster":
        for name in ("log", "ctld", "d", "hosts"):
            (self.scratch / name).mkdir(parents=True, exist_ok=True)
        (self.scratch / "hosts").rmdir()
        (self.scratch / "hosts").write_text(f"127.0.0.1 localhost {os.uname().nodename} {' '.join(self.nodes)}\n")
        first = self.port + 184
        (self.scratch / "slurm.conf").write_text(
            CONFIGURATION.format(
                scratch=self.scratch,
                port=self.port,
                nodes=len(self.nodes),
                first=first,
                last=first + len(self.nodes) - 1,
            )
        )
        key = self.scratch / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        words = [f"--{option}={self.scratch / name}" for option, name in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *words, f"--log-file={self.scratch}/log/munge.log"])
        self._wait(lambda: (self.scratch / "munge.socket").exists(), "munge")
        self._start("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.scratch / "slurm.conf")])
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: set(self.states().values()) == {"idle"}, "idle nodes", 60)
        return self

    def __exit__(self, *_: Any) -> None:
        self.call("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        self.call("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for node in self.nodes:
            self.kill_node(node)
        for name in ("slurmctld", "munged"):
            self._daemons[name].terminate()
            self._daemons[name].wait(20)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon, which knows the nodes' names."""
        mount = f"mount --bind {self.scratch}/hosts /etc/hosts && exec slurmd -D -N {node} -f {self.scratch}/slurm.conf"
        self._start(node, ["unshare", "--mount", "sh", "-c", mount], TLITE_SLURM_NODE=node)

    def kill_node(self, node: str) -> None:
        """Kills a node's daemon and whatever runs there, as if its power had failed."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        marks = (f"TLITE_SLURM_NODE={node}", f"SLURMD_NODENAME={node}")
        ours = f"SLURM_CONF={self.scratch}/slurm.conf"
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_text(errors="replace").split("\0")
                if ours in variables and any(mark in variables for mark in marks):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue

    def call(self, *words: str, check: bool = True) -> str:
        """Runs one of Slurm's commands; what it printed."""
        ended = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=120)
        assert not check or ended.returncode == 0, f"{words}: {ended.stderr}"
        return ended.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self) -> dict[str, str]:
        """Node -> idle, alloc, down ..."""
        lines = self.call("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).splitlines()
        return dict(line.split() for line in lines)

    def _start(self, name: str, command: list[str], **variables: str) -> None:
        with (self.scratch / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env={**self.environment, **variables}, stdout=log, stderr=log, start_new_session=True
            )

    def _wait(self, done: Any, what: str, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            assert time.monotonic() < deadline, f"no {what}: see {self.scratch}/log"
            time.sleep(0.1)
