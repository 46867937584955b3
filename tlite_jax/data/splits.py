"""Held-out documents: chosen by their content, so that the choice is the same whatever else there is."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tlite_jax.config import HeldOutConfig
from tlite_jax.data.permutation import mix64


def held_out(hashes: npt.NDArray[np.uint64], config: HeldOutConfig) -> npt.NDArray[np.bool_]:
    """Chooses the documents of one bucket that are set aside.

    A document is held out when the hash of its content and the seed is small, so documents added later do not move
    others. With a fraction above 0 and two documents or more, at least one is held out and one is not; above
    `max_documents` the smallest hashes stay held out.

    Args:
      hashes: uint64 [documents, 2], content hashes.
      config: fraction, limit and seed.

    Returns:
      bool [documents].
    """
    count = len(hashes)
    seed = np.full(count, config.seed % 2**64, np.uint64)
    lottery = mix64(mix64(seed ^ hashes[:, 0]) ^ hashes[:, 1])
    chosen = lottery < np.uint64(int(Fraction(repr(config.fraction)) * 2**64))
    by_lottery = np.argsort(lottery, kind="stable")
    if config.fraction and count > 1:
        chosen[by_lottery[0]] = True
        chosen[by_lottery[-1]] = False
    if config.max_documents is not None:
        chosen[by_lottery[config.max_documents :]] = False
    return chosen
