"""What each GGUF file costs beside the base of the table, measured one file after the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tlite_jax.release import inversions, table
from tlite_jax.release.files import MainKind, bits_per_weight, main_kind
from tlite_jax.release.result import Quantization


@dataclass
class Found:
    """What was measured.

    Attributes:
      rows: of the files that could be measured.
      broken: the files that could not be, a line each.
      notes: inversions, and files of the base's own type, a line each.
      base_perplexity: of the base of the table, with its standard error; 0 without rows.
    """

    rows: list[Quantization] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base_perplexity: float = 0.0
    base_perplexity_error: float = 0.0


def measure(
    files: Mapping[str, Path], compare: Callable[[Path], Mapping[str, np.ndarray]], trained_from: Path | None
) -> Found:
    """Measures files.

    Args:
      files: type -> file.
      compare: a file -> what `Passes.compare` gives of it.
      trained_from: the GGUF file that the training began with, if it was one.
    """
    found, kl = Found(), dict[str, np.ndarray]()
    kinds: dict[str, MainKind] = {}
    for kind, file in files.items():
        measured = compare(file)
        if not table.is_measurable(measured):
            found.broken.append(f"{file.name}: its predictions, or those of the base, are not finite")
            continue
        found.rows.append(table.row(kind, file.name, file.stat().st_size, bits_per_weight(file), measured))
        kl[kind], kinds[kind] = measured["kl"], main_kind(file)
        found.base_perplexity = float(np.exp(-measured["base_logp"].mean()))
        found.base_perplexity_error = found.base_perplexity * table.standard_error(measured["base_logp"])
    origin = None if trained_from is None else main_kind(trained_from)
    found.notes = [*inversions.inversions(found.rows, kl, kinds, origin), *inversions.of_the_bases_type(kinds, origin)]
    return found
