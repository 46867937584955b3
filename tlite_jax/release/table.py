"""The table of quantisations, and what in it is not as it should be.

Numbers and their errors follow llama.cpp's `llama-perplexity --kl-divergence`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from tlite_jax.release.result import Quantization, QuantizationTable

# Most KL(base || file), nats a token, that a file of each type may have. They tell a damaged file from a sound one,
# with room for small models, which suffer more from few bits than large ones do.
MOST_KL = {
    "F32": 1e-3, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K_M": 0.15, "Q5_K_S": 0.15, "Q5_1": 0.15,
    "Q5_0": 0.2, "Q4_K_M": 0.5, "Q4_K_S": 0.5, "Q4_1": 0.6, "Q4_0": 0.8, "Q3_K_L": 1.0, "Q3_K_M": 1.5, "Q3_K_S": 2.5,
    "Q2_K": 4.0,
}  # fmt: skip
_FAMILIES = (
    ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
    ("F32", "F16", "Q8_0", "Q5_1", "Q5_0"),
    ("Q8_0", "Q5_0", "Q4_0"),
    ("Q8_0", "Q5_1", "Q4_1"),
)
_SAME_SIZE = 0.02  # relative: files whose bits a weight are closer than this are not ranked
_SIGMAS = 3.0


def row(
    kind: str, file: str, num_bytes: int, bits_per_weight: float, measured: Mapping[str, np.ndarray]
) -> Quantization:
    """A row of the table.

    Args:
      kind: the file's type.
      file: its name.
      num_bytes: of the file.
      bits_per_weight: of its tensor data.
      measured: from `Passes.compare`, float64 per scored token.
    """
    change = measured["logp"] - measured["base_logp"]
    delta_p = np.exp(measured["logp"]) - np.exp(measured["base_logp"])
    same, perplexity = float(measured["same_top"].mean()), math.exp(-float(measured["logp"].mean()))
    return Quantization(
        type=kind,
        file=file,
        bytes=num_bytes,
        bits_per_weight=bits_per_weight,
        perplexity=perplexity,
        perplexity_error=perplexity * standard_error(measured["logp"]),
        log_ratio=-float(change.mean()),
        log_ratio_error=standard_error(change),
        mean_kl=float(measured["kl"].mean()),
        mean_kl_error=standard_error(measured["kl"]),
        kl_99=float(np.percentile(measured["kl"], 99)),
        max_kl=float(measured["kl"].max()),
        same_top=same,
        same_top_error=math.sqrt(same * (1 - same) / max(1, len(change) - 1)),
        rms_delta_p=math.sqrt(float((delta_p**2).mean())),
    )


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values taken as independent."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def too_far(rows: Sequence[Quantization], allowance: float = 0.0) -> list[str]:
    """The files beyond MOST_KL and what the passes' own rounding may add, a line each; what is not finite is beyond."""
    return [
        f"{row.file}: mean KL {row.mean_kl:.4g} nats a token, the limit for {row.type} is "
        f"{MOST_KL[row.type] + allowance:g}"
        for row in rows
        if row.type in MOST_KL and not row.mean_kl <= MOST_KL[row.type] + allowance
    ]


def inversions(rows: Sequence[Quantization]) -> list[str]:
    """Pairs of one family in which the larger file is the worse one, by more than both their errors, a line each."""
    by_type = {row.type: row for row in rows}
    found = {}
    for family in _FAMILIES:
        for better, worse in pairwise(by_type[kind] for kind in family if kind in by_type):
            larger = better.bits_per_weight > worse.bits_per_weight * (1 + _SAME_SIZE)
            noise = _SIGMAS * math.hypot(better.mean_kl_error, worse.mean_kl_error)
            if larger and better.mean_kl > worse.mean_kl + noise:
                found[better.type, worse.type] = (
                    f"{better.type} ({better.bits_per_weight:.2f} bits) has mean KL {better.mean_kl:.4g}, "
                    f"{worse.type} ({worse.bits_per_weight:.2f} bits) only {worse.mean_kl:.4g} "
                    f"(+-{noise:.2g} at {_SIGMAS:g} sigma)"
                )
    return list(found.values())


def lines(table: QuantizationTable) -> list[str]:
    """The table for people, Markdown that a terminal shows well."""
    header = ("type", "MB", "bits", "perplexity", "ln ratio", "mean KL", "99% KL", "max KL", "same top", "RMS dp")
    cells = [
        (
            row.type,
            f"{row.bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.3f} +-{row.perplexity_error:.3f}",
            f"{row.log_ratio:+.4f} +-{row.log_ratio_error:.4f}",
            f"{row.mean_kl:.2e} +-{row.mean_kl_error:.0e}",
            f"{row.kl_99:.2e}",
            f"{row.max_kl:.2e}",
            f"{row.same_top:.2%}",
            f"{row.rms_delta_p:.2%}",
        )
        for row in table.rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(header, *cells, strict=True)]

    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entry.ljust(width) for entry, width in zip(entries, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return [line(header), rule, *map(line, cells)]
