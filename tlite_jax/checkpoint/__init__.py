"""Checkpoints: what a run is at a step, on disk, whole or absent."""

from tlite_jax.checkpoint.model import save_model
from tlite_jax.checkpoint.state import StateReading, open_params, restore_optimizer, restore_params
from tlite_jax.checkpoint.stored import Checkpoint, Meta, Recent, find, is_step, parse_step, steps_on_disk

__all__ = [
    "Checkpoint",
    "Meta",
    "Recent",
    "StateReading",
    "find",
    "is_step",
    "open_params",
    "parse_step",
    "restore_optimizer",
    "restore_params",
    "save_model",
    "steps_on_disk",
]
