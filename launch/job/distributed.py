"""Joining a job of several processes."""

import errno
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from launch.job.abort import Overheard, restart_on_abort
from launch.job.world import World, find_world, given_world, gpu_ids, outside_of_srun
from tlite_jax.errors import UserError
from tlite_jax.telemetry.watchdog import EXIT_RESTART

PORT_SECONDS = 10.0  # that a port may still be held by the job's last coordinator
HEARTBEAT_SECONDS = 10  # a dead process is noticed after about this long; jax's default is 100
JOIN_SECONDS = 300.0  # jax's default
_GRACE_SECONDS = 5  # by which process 0, who knows who is absent, is to say so before the others give up


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, join_seconds: float = JOIN_SECONDS
) -> None:
    """Connects this process to its job, if it is part of one; to be called before jax looks for devices.

    Without arguments a job is recognised by torchrun's, Kubernetes', Open MPI's or Slurm's environment variables, and
    on TPU machines by jax.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: in the job.
      process_id: 0-based.
      join_seconds: that all processes have to come in; past it jax aborts this one (`launch.job.abort`).

    Raises:
      UserError: some of the three given, or the job cannot be joined.
    """
    world = given_world(coordinator, num_processes, process_id) or find_world(os.environ, socket.getfqdn)
    if world is not None:
        _join(world, join_seconds)
    elif on_tpu(os.environ, Path("/dev")):
        _join_tpu_pod()
    elif tasks := outside_of_srun(os.environ):
        print(
            f"started without srun in a Slurm job of {tasks} nodes: this process trains alone, on this node; "
            "for all of them, start it with srun",
            file=sys.stderr,
        )


def _join(world: World, join_seconds: float) -> None:
    import jax

    own = gpu_ids(world, count_gpus(os.environ))
    if world.process_id == 0:
        _wait_for_port(world)
    seconds = max(1, round(join_seconds))
    try:
        with Overheard() as overheard, _naming_the_absent(seconds):
            restart_on_abort(lambda: absent(overheard.last_words(), world, seconds))
            jax.distributed.initialize(
                world.coordinator,
                world.num_processes,
                world.process_id,
                local_device_ids=own,
                cluster_detection_method="deactivate",  # it would choose one GPU where `own` is None, all of them
                initialization_timeout=seconds + _GRACE_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        restart_on_abort()
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"process {world.process_id} of {world.num_processes} ({world.found_by}) cannot join the job at "
            f"{world.coordinator}: {line}"
        ) from error


def _wait_for_port(world: World) -> None:
    """Returns when process 0 can listen on its port; jax would crash, without a word, where another process has it.

    Raises:
      UserError: it is not free within a few seconds, or not allowed.
      SystemExit: the same, where a restart will choose another port.
    """
    port = int(world.coordinator.rpartition(":")[2])
    end = time.monotonic() + PORT_SECONDS
    while True:
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", port))
            return
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < end:  # by a coordinator that is still dying
                time.sleep(0.5)
                continue
            said = (
                f"process 0 of {world.num_processes} ({world.found_by}) cannot listen on port {port}: {error.strerror}"
            )
            if world.found_by == "Slurm":
                print(f"error: {said}; start the job again", file=sys.stderr, flush=True)
                raise SystemExit(EXIT_RESTART) from error
            raise UserError(f"{said}; choose another one") from error


def absent(said: str, world: World, seconds: int) -> str:
    """Who has not come to the job, from what jax says when it gives up."""
    limit = f"within {seconds} s (watchdog.join), start the job again"
    named = re.search(r"timed out task names:\n((?:\S+\n)+)", said)
    if named is None:
        return f"process 0 was not reached at {world.coordinator} {limit}"
    numbers = [name.rpartition(":")[2] for name in named[1].split()]
    who = f"process {numbers[0]} has" if len(numbers) == 1 else f"processes {', '.join(numbers)} have"
    return f"{who} not come {limit}"


@contextmanager
def _naming_the_absent(seconds: int) -> Iterator[None]:
    """Lets process 0's service end the wait for all processes, with the names of those that have not come.

    jax does not pass this limit on, an hour by default, so that processes give up without having been told.
    """
    try:
        from jax._src.lib import _jax

        real = _jax.get_distributed_runtime_service
    except (ImportError, AttributeError):  # another jax: the same wait, without names
        yield
        return
    _jax.get_distributed_runtime_service = partial(real, cluster_register_timeout=seconds)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = real


def _join_tpu_pod() -> None:
    import jax

    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if "should be defined" not in str(error):  # jax's word for: no pod, one machine
            raise UserError(f"cannot join the TPU pod: {str(error).strip().splitlines()[0]}") from error
    except RuntimeError as error:
        raise UserError(f"cannot join the TPU pod: {str(error).strip().splitlines()[0]}") from error


def on_tpu(environment: Mapping[str, str], devices: Path) -> bool:
    """Whether this machine has TPU chips that jax will use; `devices` is /dev."""
    from importlib.util import find_spec

    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    chips = [*devices.glob("accel[0-9]*"), *devices.glob("vfio/[0-9]*")]
    return bool(chips) and find_spec("libtpu") is not None


def count_gpus(environment: Mapping[str, str]) -> int:
    """The NVIDIA GPUs that CUDA shows to a process of this environment; 0 where there is no driver."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.SubprocessError):
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
