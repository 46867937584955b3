"""`release.json`: what the gate found of a release, for scripts and for the model card."""

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from tlite_jax.config import Section
from tlite_jax.config_files import parse
from tlite_jax.errors import UserError

FILE_NAME = "release.json"
_MAX_BYTES = 16 << 20
Status = Literal["passed", "failed", "not run"]


class Check(Section):
    """One check.

    Attributes:
      name: short, fixed, e.g. "hf logits".
      status: "not run" where something that it needs is missing; `details` says what.
      bound: what had to hold, in words.
      value: what was found, in words.
      seconds: it took.
      details: what differs or was left out, a line each.
      allowed: whether the user let it be left out; only of checks that were not run.
    """

    name: str
    status: Status
    bound: str
    value: str
    seconds: float
    details: tuple[str, ...] = ()
    allowed: bool = False

    @property
    def holds_up(self) -> bool:
        """Whether the release cannot pass because of it."""
        return self.status == "failed" or (self.status == "not run" and not self.allowed)


class Quantization(Section):
    """A GGUF file beside the base of the table, as `llama-perplexity --kl-divergence` reports it.

    Errors are standard errors of the means over the scored tokens.

    Attributes:
      type: e.g. "Q4_K_M".
      file: as in ReleaseResult.files.
      bits_per_weight: bits of tensor data a weight.
      perplexity: exp of the mean of -ln p of the text's tokens.
      log_ratio: mean ln(perplexity / the base's).
      mean_kl: of KL(base || file), nats a token; with the 99th percentile and the largest.
      same_top: share of tokens whose most likely token is the base's.
      rms_delta_p: root of the mean square of the change of the text's tokens' probabilities.
    """

    type: str
    file: str
    bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_error: float
    log_ratio: float
    log_ratio_error: float
    mean_kl: float
    mean_kl_error: float
    kl_99: float
    max_kl: float
    same_top: float
    same_top_error: float
    rms_delta_p: float


class QuantizationTable(Section):
    """The files that were measured, and on what.

    Attributes:
      base: "F16" (that file), or "checkpoint" where there is none.
      base_perplexity: with its standard error.
      context: tokens of a window, of which the second half is scored.
      num_windows, num_tokens: windows, and tokens scored in all.
      sample: where the text comes from.
    """

    base: Literal["F16", "checkpoint"]
    base_perplexity: float
    base_perplexity_error: float
    context: int
    num_windows: int
    num_tokens: int
    sample: str
    rows: tuple[Quantization, ...]


class Generated(Section):
    """What a model wrote, greedily: `source` is "checkpoint" or a file's name."""

    source: str
    prompt: str
    text: str
    num_tokens: int


class ReleasedFile(Section):
    """A file of the release; `path` begins at the release directory where the file is in it."""

    path: str
    bytes: int
    sha256: str


class ReleaseResult(Section):
    """Everything.

    Attributes:
      passed: whether nothing holds the release up.
      checkpoint, step: what is released.
      base: what it was adapted from, where that is known.
      recipe_hash: of the config in the checkpoint, as in GGUF metadata; None for an imported model.
      num_parameters: a tied head counted once.
      compute_dtype: of the passes behind the numbers.
      versions: package -> version, of what was used.
    """

    format_version: Literal[1] = 1
    passed: bool
    checkpoint: str
    step: int
    base: str | None
    recipe_hash: str | None
    num_parameters: int
    compute_dtype: Literal["float32", "bfloat16"]
    checks: tuple[Check, ...]
    quantizations: QuantizationTable | None
    generated: tuple[Generated, ...]
    files: tuple[ReleasedFile, ...]
    versions: dict[str, str] = Field(default={})

    def named(self, name: str) -> Check | None:
        """The check of a name."""
        return next((check for check in self.checks if check.name == name), None)


def save(result: ReleaseResult, directory: Path) -> Path:
    """Writes release.json, whole or not at all; returns its path."""
    path = directory / FILE_NAME
    scratch = path.with_name(f"{FILE_NAME}.partial")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text_of(result))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    return path


def text_of(result: ReleaseResult) -> str:
    """The content of release.json."""
    return json.dumps(result.model_dump(mode="json"), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def load(path: Path) -> ReleaseResult:
    """Reads release.json, of a directory or by its own path.

    Raises:
      UserError: it is absent, or not one.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UserError(f"{file}: {file.stat().st_size} bytes; such a file has at most {_MAX_BYTES}")
        values = json.loads(file.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}: {error}; make it with `python -m launch gate`") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a release.json")
    return parse(ReleaseResult, values, str(file))
