"""`train --profile-steps 10:13`: a trace of those steps for xprof, TensorBoard or Perfetto."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.train.step import Step


class Profile:
    """Traces the steps from FIRST up to, but not including, END, on the devices of process 0."""

    def __init__(self, steps: str, directory: Path):
        """Takes "FIRST:END", steps counted from 1. Raises UserError for anything else."""
        found = re.fullmatch(r"(\d+):(\d+)", steps)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise UserError(f"--profile-steps {steps!r} is not FIRST:END with 0 < FIRST < END, such as 10:13")
        self._first, self._end = int(found[1]), int(found[2])
        self._directory = directory
        self._traces = self._written = False

    def around(self, step_fn: "Step", start_step: int) -> "Step":
        """The step, traced when its turn comes; `start_step` were computed before the first call."""
        step = start_step

        def traced(state: Any, batch: Any) -> Any:
            nonlocal step
            step += 1
            self.before_step(step, state)
            return step_fn(state, batch)

        return traced

    def before_step(self, step: int, state: Any) -> None:
        """To be called before each step, with the state that it starts from."""
        import jax

        if step >= self._end:
            self._stop(state)
        elif step >= self._first and jax.process_index() == 0 and not self._traces:
            jax.block_until_ready(state)  # what was started before is no part of it
            jax.profiler.start_trace(self._directory)
            self._traces = True

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the trace of a run that has ended before END."""
        self._stop(None)
        import jax

        if not self._written and jax.process_index() == 0:
            print(f"no step from {self._first} to {self._end - 1} was computed: nothing to profile", file=sys.stderr)

    def _stop(self, state: Any) -> None:
        import jax

        if self._traces:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._traces, self._written = False, True
            print(f"profile: {self._directory}", file=sys.stderr)
