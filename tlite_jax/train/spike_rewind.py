"""Going back before a spike: the very rewind that `launch rewind` declares, and training on in the same process.

The steps before the skipped ones are computed again, from the same checkpoint and rows to the same bits, so that the
run is the one that would have come about had it never read what it skips. A kill at any moment loses nothing: before
the rewind is declared the resumed run meets the same spike again, and after it `open_run` finishes it.
"""

import gc
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tlite_jax.train.lock import locked
from tlite_jax.train.loop import Result
from tlite_jax.train.rewind import count_automatic, rewind
from tlite_jax.train.run import Run, open_run
from tlite_jax.train.spikes import SpikeFoundError


def train_to_the_end(train_once: Callable[[Run], Result], run: Run, mesh: Mesh) -> Result:
    """Trains a run, going back as often as `train.spikes` allows.

    Args:
      train_once: `train.loop.train` with whatever goes with it; called again for each rewind.
      run: from `open_run`.
      mesh: of all devices.

    Raises:
      SpikesError: it has gone back too often.
    """
    while True:
        try:
            return train_once(run)
        except SpikeFoundError as spike:
            first, last = spike.first, spike.last
        # The error's frames are gone here, and with them the state, whose memory the next one needs.
        gc.collect()
        run = go_back(run, mesh, first, last)


def go_back(run: Run, mesh: Mesh, first: int, last: int) -> Run:
    """Declares that the batches around spiking steps are skipped and opens the run before them, on all processes.

    Args:
      run: that nothing trains any more; its last save may be under way in other processes.
      mesh: of all devices.
      first, last: of the spiking steps.

    Raises:
      UserError: the directory cannot be written.
    """
    _all_here("spike found")
    if jax.process_index() == 0:
        with locked(run.directory):
            _declare(run, first, last)
    _all_here("rewound")
    return open_run(run.config, mesh=mesh)


def _declare(run: Run, first: int, last: int) -> None:
    spikes, size = run.config.train.spikes, run.config.train.batch_size
    num_steps = run.start_step + (run.timeline.total_rows - run.rows_consumed) // size
    to = max(0, first - spikes.back)
    skip = to + 1, min(last + spikes.margin, num_steps)
    done = rewind(run.directory, to=to, skip=skip, automatic=True)
    who = f"step {first} spikes" if first == last else f"steps {first} to {last} spike"
    print(
        f"{who}: going on from step {done.step} without the batches of steps {skip[0]} to "
        f"{skip[1]} (automatic rewind {count_automatic(run.directory)} of {spikes.max_rewinds}); what was is in "
        f"{done.directory}",
        flush=True,
    )


def _all_here(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
