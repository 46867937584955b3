"""Where an export takes its weights from: tensors under Hugging Face names, read a few rows at a time."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from tlite_jax.bridge.names import Slot, slots
from tlite_jax.config import ModelConfig


class TensorSource(Protocol):
    """Weights that need not be in memory. Several threads may read at once.

    Attributes:
      shapes: of every tensor by its Hugging Face name, in Hugging Face's layout.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Returns rows [begin, end) of a tensor, in the dtype it is stored in."""


class ParamsSource:
    """Our nested dict of stacked parameters: numpy arrays, or anything that slices like them and converts to them."""

    def __init__(self, params: Mapping[str, Any], model: ModelConfig) -> None:
        self._params = params
        self._slots: dict[str, Slot] = {slot.hugging_face: slot for slot in slots(model)}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: slot.shape for name, slot in self._slots.items()}

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Returns rows [begin, end) of a tensor."""
        slot = self._slots[name]
        group, _, leaf = slot.path.rpartition("/")
        array = self._params[group][leaf] if group else self._params[leaf]
        return np.asarray(array[rows] if slot.layer is None else array[slot.layer, rows])
