"""Tells spikes: a loss or a gradient norm far above those of the steps before it.

Center and width are the median and the median absolute deviation (MAD) of a window of steps, which half of it can
spike without moving far. 1.4826 MADs are a standard deviation where the noise is normal (Leys et al., 2013). A gradient
norm is compared by its logarithm: its noise is a factor. Only what lies above counts.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tlite_jax.config import SpikesConfig

NUM_TO_BEGIN = 32  # steps in the window before anything is a spike; all of a smaller window
_MAD_TO_DEVIATION = 1.4826
_LEAST_LOSS_WIDTH = 0.005  # of the median, however even the others are: with 8 deviations, 4% above it is no spike
_LEAST_NORM_WIDTH = 0.05  # of the logarithm: with 8 deviations, a factor of 1.4 is none
_LEAST_NORM = 1e-30


@dataclass(frozen=True)
class Spike:
    """A value that spikes.

    Attributes:
      name: "loss" or "gradient_norm".
      value: of the step.
      median: of the steps before it.
      deviations: how far above it, in robust standard deviations.
    """

    name: str
    value: float
    median: float
    deviations: float


class SpikeDetector:
    """Compares each step with those before it; depends on their values and nothing else.

    Args:
      config: thresholds and the window's length.
      losses, gradient_norms: of the finite steps before the first that will be seen, as `window` gave them.
    """

    def __init__(self, config: SpikesConfig, losses: Sequence[float] = (), gradient_norms: Sequence[float] = ()):
        self._config = config
        self._losses = deque(losses, maxlen=config.window)
        self._norms = deque(gradient_norms, maxlen=config.window)

    def see(self, loss: float, gradient_norm: float) -> list[Spike]:
        """What spikes in a finite step, which then joins the window; spikes do too, so that a new level is learned."""
        config, found = self._config, []
        if len(self._losses) >= min(NUM_TO_BEGIN, config.window):
            center, width = _center_and_width(np.array(self._losses))
            deviations = (loss - center) / max(width, _LEAST_LOSS_WIDTH * abs(center), 1e-12)
            if config.loss_deviations is not None and deviations > config.loss_deviations:
                found.append(Spike("loss", loss, center, deviations))
            center, width = _center_and_width(np.log(np.maximum(np.array(self._norms), _LEAST_NORM)))
            deviations = (math.log(max(gradient_norm, _LEAST_NORM)) - center) / max(width, _LEAST_NORM_WIDTH)
            if config.gradient_norm_deviations is not None and deviations > config.gradient_norm_deviations:
                found.append(Spike("gradient_norm", gradient_norm, math.exp(center), deviations))
        self._losses.append(loss)
        self._norms.append(gradient_norm)
        return found

    def forget(self) -> None:
        """Empties the window: what comes is not to be compared with what was."""
        self._losses.clear()
        self._norms.clear()

    @property
    def window(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Losses and gradient norms of the steps it compares with, the oldest first."""
        return tuple(self._losses), tuple(self._norms)


def _center_and_width(values: np.ndarray) -> tuple[float, float]:
    center = float(np.median(values))
    return center, _MAD_TO_DEVIATION * float(np.median(np.abs(values - center)))
