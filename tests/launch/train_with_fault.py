"""`python -m launch train`, but one process of the job waits forever for a batch. Arguments: PROCESS BATCH WORD..."""

import sys
import threading
from collections.abc import Iterator

from launch.__main__ import main
from tlite_jax.train import loop

REAL = loop.batches


def never_comes(process: int, last: int, *words: object, **named: object) -> Iterator:
    """The real batches, of which `process` gets only so many."""
    import jax

    for number, batch in enumerate(REAL(*words, **named)):
        if number == last and jax.process_index() == process:
            threading.Event().wait()
        yield batch


if __name__ == "__main__":
    process, last = int(sys.argv[1]), int(sys.argv[2])
    loop.batches = lambda *words, **named: never_comes(process, last, *words, **named)
    sys.argv = ["launch", *sys.argv[3:]]
    sys.exit(main())
