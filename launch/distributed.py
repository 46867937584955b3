"""Joining a job of several processes."""

import os

from tlite_jax.errors import UserError

HEARTBEAT_SECONDS = 10  # a dead process is noticed after about this long; jax's default is 100


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to its job, if it is part of one; to be called before jax looks for devices.

    Without arguments, a job is recognised by Slurm's or Open MPI's environment variables.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: in the job.
      process_id: 0-based.

    Raises:
      UserError: some of the three given, or the job cannot be joined.
    """
    import jax

    given = [coordinator, num_processes, process_id]
    sizes = [os.environ.get(name) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    found = any(size and size.isdecimal() and int(size) > 1 for size in sizes)
    in_step = "SLURM_STEP_ID" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise UserError("give --coordinator, --num-processes and --process-id together, or none of them")
        if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
            raise UserError(f"--process-id {process_id} is not one of 0..{num_processes - 1}")
    elif not (found and in_step):
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"cannot join the job at {coordinator or 'the address of the scheduler'}: {line}") from error
