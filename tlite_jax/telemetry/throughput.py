"""How fast a run goes: tokens a second, and the share of the hardware's peak that the work amounts to.

Two conventions, both reported and named everywhere. `mfu` is that of T-lite's model card (and of PaLM's appendix B):
6 N + 12 L d S FLOPs a token with every parameter counted, embeddings included, and attention over the full square.
`mfu_causal` counts the work that is really needed: parameters that take part in matrix products, and the causal half
of attention. Neither counts recomputation. With document masking both still count attention over whole rows.
"""

import re
from typing import NamedTuple

from tlite_jax.config import ModelConfig
from tlite_jax.telemetry.metrics import Metrics

# Dense bf16 FLOP/s of one jax device. NVIDIA gives most with 2:4 sparsity: these are half of that. An entry applies
# to a device kind that has all its words; the first that does wins.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("TPU v4", 275e12),  # cloud.google.com/tpu/docs/v4: 275 TFLOPs a chip
    ("TPU v5 lite", 197e12),  # cloud.google.com/tpu/docs/v5e
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),  # cloud.google.com/tpu/docs/v5p
    ("TPU v5", 459e12),  # how jax names v5p
    ("TPU v6 lite", 918e12),  # cloud.google.com/tpu/docs/v6e
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),  # cloud.google.com/tpu/docs/tpu7x: 2307 a chip, which is two devices
    ("GB200", 2500e12),  # NVIDIA Blackwell architecture brief: 5 PFLOPS sparse a GPU
    ("B200", 2250e12),  # NVIDIA HGX B200 datasheet: 4.5 PFLOPS sparse
    ("GH200", 989e12),  # NVIDIA GH200 datasheet: 1,979 sparse
    ("H200 NVL", 835e12),  # NVIDIA H200 datasheet: 1,671 sparse
    ("H200", 989e12),  # NVIDIA H200 datasheet, SXM: 1,979 sparse
    ("H100 NVL", 835e12),  # NVIDIA H100 NVL datasheet: 1,671 sparse
    ("H100 PCIe", 756e12),  # NVIDIA H100 datasheet, PCIe: 1,513 sparse
    ("H100", 989e12),  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    ("H800 PCIe", 756e12),  # as H100, with less NVLink
    ("H800", 989e12),
    ("A100", 312e12),  # NVIDIA A100 datasheet: 312, SXM and PCIe
    ("A800", 312e12),  # as A100, with less NVLink
    ("A40", 149.7e12),  # NVIDIA A40 datasheet
    ("A30", 165e12),  # NVIDIA A30 datasheet
    ("A10", 125e12),  # NVIDIA A10 datasheet
    ("L40S", 362e12),  # NVIDIA L40S datasheet: 362.05
    ("L40", 181e12),  # NVIDIA L40 datasheet: 181.05
    ("L4", 121e12),  # NVIDIA L4 datasheet: 242 sparse
)


class Flops(NamedTuple):
    """Training FLOPs a token (forward and backward) by both conventions."""

    mfu: float
    mfu_causal: float


def num_parameters(model: ModelConfig) -> int:
    """The number of parameters, embeddings included; a tied embedding counts once."""
    return sum(_parameters(model))


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs that training on one token takes; see the top of the file for the two conventions.

    Args:
      model: the shape.
      sequence_length: S, tokens in a row.

    Returns:
      6 N + 12 L d S and 6 (matrix parameters) + 6 L d S, where d = heads * head_dim. 61.07e9 and 51.47e9 for
      Llama-3-8B at 8192. Follows Chowdhery et al. 2022 (PaLM), appendix B.
    """
    matrices, _ = _parameters(model)
    layers_width = model.num_hidden_layers * model.num_attention_heads * model.head_dim
    return Flops(
        mfu=6.0 * num_parameters(model) + 12.0 * layers_width * sequence_length,
        mfu_causal=6.0 * matrices + 6.0 * layers_width * sequence_length,
    )


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of matrix products, and all others. The output head is a product, also when it is tied."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    block_matrices = model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size)
    block_vectors = 2 * model.hidden_size
    if model.attention_bias:
        block_vectors += queries + 2 * keys + model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    looked_up = 0 if model.tie_word_embeddings else embedding
    matrices = model.num_hidden_layers * block_matrices + embedding
    return matrices, model.num_hidden_layers * block_vectors + model.hidden_size + looked_up


def peak_flops(device_kind: str) -> float | None:
    """The dense bf16 peak of one device in FLOP/s.

    Args:
      device_kind: `jax.Device.device_kind`, e.g. "NVIDIA A100-SXM4-80GB", "TPU v5 lite".

    Returns:
      None where it is unknown: CPUs, slices of a GPU (MIG), GPUs without bf16 units (V100, T4) and those not listed.
      The config's `telemetry.peak_flops_per_device` then says it.
    """
    words = set(_words(device_kind))
    if "mig" in words:
        return None
    return next((flops for kind, flops in _PEAK_FLOPS if words.issuperset(_words(kind))), None)


def _words(kind: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", kind.lower())


class Throughput:
    """Turns the times at which steps were seen to be complete into tokens a second and MFU.

    It reads no clock and no device: the caller passes times, of whichever step it has already waited for. Rates are
    averages over the steps since the time before; the first time gives none, so compilation is not counted.

    Args:
      flops: of a token, from `flops_per_token`.
      tokens_per_step: over all devices.
      num_devices: that share the work.
      peak_flops_per_device: FLOP/s; None leaves out mfu and mfu_causal.
    """

    def __init__(self, flops: Flops, *, tokens_per_step: int, num_devices: int, peak_flops_per_device: float | None):
        self._flops = flops
        self._tokens_per_step = tokens_per_step
        self._peak = None if peak_flops_per_device is None else peak_flops_per_device * num_devices
        self._last: tuple[int, float] | None = None

    def restart(self, step: int, seconds: float) -> None:
        """Begins a new interval: what came before (compilation, evaluation, saving) is not counted.

        Args:
          step: number of completed steps.
          seconds: the time now, on the same clock as `update`'s.
        """
        self._last = step, seconds

    def update(self, step: int, seconds: float) -> Metrics:
        """Takes the time at which a step was complete.

        Args:
          step: number of completed steps.
          seconds: on any monotonic clock.

        Returns:
          step_seconds, tokens_per_second (all devices) and, where the peak is known, mfu and mfu_causal in [0, 1];
          nothing the first time.
        """
        last, self._last = self._last, (step, seconds)
        if last is None or step <= last[0] or seconds <= last[1]:
            return {}
        step_seconds = (seconds - last[1]) / (step - last[0])
        tokens_per_second = self._tokens_per_step / step_seconds
        rates = {"step_seconds": step_seconds, "tokens_per_second": tokens_per_second}
        if self._peak is not None:
            rates["mfu"] = tokens_per_second * self._flops.mfu / self._peak
            rates["mfu_causal"] = tokens_per_second * self._flops.mfu_causal / self._peak
        return rates
