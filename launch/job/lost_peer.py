"""What a process does when another one of its job is gone: end at once, with the status that asks for a restart."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tlite_jax.telemetry.watchdog import EXIT_RESTART

# How the runtime begins such errors, and who writes them: gloo between CPUs, NCCL between GPUs, jax's coordinator.
_CODES = re.compile(r"^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b")
_TRANSPORTS = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|coordination service|heartbeat|broken pipe", re.I
)


@contextmanager
def restart_when_alone() -> Iterator[None]:
    """Ends this process with status 76 when what is inside fails because another process cannot be reached."""
    try:
        yield
    except Exception as error:
        import jax

        if jax.process_count() == 1 or not is_lost_peer(error):
            raise
        line = str(error).strip().splitlines()[0]
        print(f"error: lost another process of the job, start it again: {line}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_RESTART)  # an orderly exit waits for the one that is gone


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of jax's runtime says that another process cannot be reached."""
    import jax

    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(_CODES.match(text) or _TRANSPORTS.search(text))
