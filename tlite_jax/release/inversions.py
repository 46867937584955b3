"""Where fewer bits predict better: said with its statistical error and what the files and the base tell of it.

No failure: sound files do it, e.g. those of weights that came from a quantised file (docs/release.md).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.release.files import MainKind
from tlite_jax.release.result import Quantization
from tlite_jax.release.table import standard_error

_TOLD_APART = 2.0  # standard errors
_SUPER_BLOCK = 256  # weights of a row that the K types take at once
_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def inversions(
    rows: Sequence[Quantization],
    kl: Mapping[str, np.ndarray],
    kinds: Mapping[str, MainKind],
    base: MainKind | None = None,
) -> list[str]:
    """Each file that has a larger mean KL than a smaller one, beside the best of these, a line each.

    Args:
      rows: of the table.
      kl: type -> KL(base || file) of each scored token, the same tokens for all.
      kinds: type -> what the file holds.
      base: what the file holds that the training began with; None where it was not GGUF.
    """
    found = []
    for row in rows:
        smaller = [other for other in rows if other.bits_per_weight < row.bits_per_weight]
        best = min(smaller, key=lambda other: other.mean_kl, default=row)
        if best.mean_kl < row.mean_kl:
            difference = kl[row.type] - kl[best.type]
            found.append(
                f"{row.type} ({row.bits_per_weight:.2f} bits) predicts worse than {best.type} "
                f"({best.bits_per_weight:.2f}): mean KL {row.mean_kl:.4f} and {best.mean_kl:.4f}, difference "
                f"{difference.mean():.4f} +-{standard_error(difference):.4f}; "
                f"{_why(difference, row.type, best.type, kinds, base)}"
            )
    return found


def of_the_bases_type(kinds: Mapping[str, MainKind], base: MainKind | None) -> list[str]:
    """Warns of files whose blocks are the base's: rounding to its grid may take back what training changed."""
    return [
        f"{kind} stores most weights as {held.name}, as the base's file does: updates smaller than half a step of that "
        "grid are rounded away, and the file may predict as the base did"
        for kind, held in kinds.items()
        if base is not None and base.name in _BLOCKS and held.name == base.name
    ]


def _why(difference: np.ndarray, worse: str, better: str, kinds: Mapping[str, MainKind], base: MainKind | None) -> str:
    error = standard_error(difference)
    if difference.mean() <= _TOLD_APART * error:
        return f"within {_TOLD_APART:g} errors: this sample does not tell them apart, more --windows may"
    times = f"{difference.mean() / error:.0f} errors" if error else "without error"
    parts = [f"{times}, so no chance", *(_held(kind, kinds[kind]) for kind in (worse, better))]
    if base is not None and base.name in _BLOCKS:
        parts.append(f"the base was {base.name}: its weights lie near that grid, which other grids meet unequally")
    return "; ".join(parts)


def _held(file_type: str, held: MainKind) -> str:
    block = f"super-blocks of {_SUPER_BLOCK}" if held.name.endswith("_K") else "blocks of 32"
    said = f"{file_type} is {held.share:.0%} {held.name}"
    said += f" ({block})" if held.name in _BLOCKS else ""
    wanted = FILE_TYPES[file_type].default
    uneven = sorted(length for length in held.row_lengths if math.gcd(length, _SUPER_BLOCK) != _SUPER_BLOCK)
    if wanted.endswith("_K") and held.name != wanted and uneven:
        said += f", as rows of {uneven[0]} are no multiple of {_SUPER_BLOCK}"
    return said
