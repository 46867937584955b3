"""The table of quantisations, and what in it is not as it should be.

Numbers and their errors follow llama.cpp's `llama-perplexity --kl-divergence`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tlite_jax.release.result import Quantization, QuantizationTable

# Most KL(base || file), nats a token, of the types that are all but exact.
ALMOST_EXACT = {"F32": 1e-3, "F16": 1e-3, "BF16": 0.02, "Q8_0": 0.02}
# Most ln(perplexity / the base's) of any type: 7.4 times the base's. The worst sound file measured, Q2_K of a model of
# 135M, has 0.33; predictions that know nothing of the text have ln(vocabulary) - ln(the base's), 8 for that model.
MOST_LOG_RATIO = 2.0
_LARGEST_EXPONENT = 700.0  # of a perplexity that float64 holds


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


def is_measurable(measured: Mapping[str, np.ndarray]) -> bool:
    """Whether predictions are finite and their perplexities are numbers that float64 holds."""
    means = [float(measured[name].mean()) for name in ("logp", "base_logp")]
    return bool(np.isfinite(measured["kl"]).all()) and all(mean > -_LARGEST_EXPONENT for mean in means)


def too_far(rows: Sequence[Quantization], most_kl: Mapping[str, float], allowance: float = 0.0) -> list[str]:
    """The files that cannot be right, and those beyond the user's limits, a line each; what is not finite is beyond.

    Args:
      rows: of the table.
      most_kl: type -> most mean KL, nats a token: the user's, taken as they are.
      allowance: what the passes' own rounding may add to ALMOST_EXACT.
    """
    found = []
    for row in rows:
        said = f"{row.file}: mean KL {row.mean_kl:.4g} nats a token"
        if row.type in ALMOST_EXACT and not row.mean_kl <= ALMOST_EXACT[row.type] + allowance:
            found.append(f"{said}, the limit of {row.type} is {ALMOST_EXACT[row.type] + allowance:g}")
        if row.type in most_kl and not row.mean_kl <= most_kl[row.type]:
            found.append(f"{said}, --most-kl {row.type}={most_kl[row.type]:g}")
        if not row.log_ratio <= MOST_LOG_RATIO:
            found.append(
                f"{row.file}: ln(perplexity / the base's) {row.log_ratio:.4g}, "
                f"no sound file has more than {MOST_LOG_RATIO:g}"
            )
    return found


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
