"""The gate: every check of a release, one after the other, none of which ends the others.

Memory holds one model at a time, in the dtype that is computed in; files are read slice by slice.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

import tlite_jax
from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.files import read_json
from tlite_jax.bridge.gguf import model_config_from_gguf
from tlite_jax.bridge.hf import import_hf
from tlite_jax.bridge.hf_config import model_config_from_hf
from tlite_jax.bridge.names import slots
from tlite_jax.bridge.tokenizer import TOKENIZER, load_tokenizer
from tlite_jax.bridge.verify import verify_gguf, verify_hf
from tlite_jax.checkpoint import Checkpoint, open_params, restore_params
from tlite_jax.config import digest
from tlite_jax.errors import UserError
from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.model.decoder import param_specs
from tlite_jax.release import base as bases
from tlite_jax.release import forgetting, quantizations, references, table, token_ids, weights, writing
from tlite_jax.release.files import Exports, hashed, read_gguf, shape_of
from tlite_jax.release.passes import Passes
from tlite_jax.release.result import Check, Generated, QuantizationTable, ReleaseResult, Status
from tlite_jax.release.sample import LANGUAGES, Windows, documents, half_windows, whole_windows
from tlite_jax.sharding import place_params

# dtype of the passes -> (mean KL at most, same most likely token at least): bfloat16 itself moves logits by a percent
BFLOAT16_KL = 2e-2
F16_BOUNDS = {"float32": (1e-4, 0.98), "bfloat16": (BFLOAT16_KL, 0.9)}
LOGITS_TOKENS = 128
CONTEXT = 512
_MOST_DETAILS = 20
_SCRATCH = ".gate."


@dataclass(frozen=True)
class Options:
    """What a user chooses.

    Attributes:
      dtype: float32 or bfloat16, of every pass.
      text, text_name: the sample of the quantisation table, and where it comes from.
      windows: most of it.
      allowed: names of missing things that may be missing: torch, base, hf, gguf.
      most_kl: GGUF type -> most mean KL that its file may have, nats a token.
    """

    dtype: str
    text: str
    text_name: str
    windows: int
    allowed: frozenset[str]
    most_kl: Mapping[str, float] = field(default_factory=dict)


class Outcome(NamedTuple):
    """What a check found; `missing` names what it lacked, where it was not run."""

    status: Status
    value: str
    details: Sequence[str] = ()
    missing: str = ""


def judged(wrong: Sequence[str], value: str, details: Sequence[str] = ()) -> Outcome:
    """Passed where nothing is wrong."""
    return Outcome("failed" if wrong else "passed", value, [*wrong, *details])


@dataclass
class Gate:
    """The checks of one release.

    Args:
      checkpoint: what is released.
      exports: its files.
      base: from `bases.find_base`.
      directory: of the release; scratch files go there.
      mesh: to compute on.
      load: a directory -> Transformers' tokenizer.
      options: the user's.
      on_check: called with each check when it is done.
    """

    checkpoint: Checkpoint
    exports: Exports
    base: bases.Base | None
    directory: Path
    mesh: Mesh
    load: Callable[[Path], Any]
    options: Options
    on_check: Callable[[Check], None] = lambda check: None
    checks: list[Check] = field(default_factory=list)
    table: QuantizationTable | None = None
    generated: list[Generated] = field(default_factory=list)

    def run(self) -> ReleaseResult:
        """Runs all checks; never raises for what is wrong with the release."""
        for leftover in self.directory.glob(f"{_SCRATCH}*"):  # of a gate that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=_SCRATCH) as scratch:
            self._scratch = Path(scratch)
            for name, (bound, check) in self.parts().items():
                self._check(name, bound, check)
        return self._result()

    def parts(self) -> dict[str, tuple[str, Callable[[], Outcome]]]:
        """Name -> (bound, check), in the order in which they are run."""
        return {
            "weights finite": ("no NaN, no infinity in the checkpoint", self._finite),
            "files intact": ("layout, config, tokenizer, values and SHA-256 of every file", self._intact),
            "base round trip": ("base -> checkpoint -> HF gives every tensor back, bit for bit", self._base),
            "hf weights": ("equal to the checkpoint's in the export's dtype, bit for bit", self._hf_weights),
            "gguf weights": ("what the checkpoint's weights become in each tensor's type", self._gguf_weights),
            "token ids": ("one and the same in every file and program", self._token_ids),
            "hf logits": (self._logits_bound(), self._hf_logits),
            "gguf f16": (
                "mean KL from the checkpoint <= {:g}, same top >= {:.0%}".format(*F16_BOUNDS[self.options.dtype]),
                self._f16,
            ),
            "quantizations": ("finite, not beyond what its type can cost, nor --most-kl", self._quantizations),
            "generation": ("finite, not empty, not a loop from the start", self._generation),
            "forgetting": ("evaluation.watch of the run's config", self._forgetting),
        }

    def _check(self, name: str, bound: str, check: Callable[[], Outcome]) -> None:
        started = time.monotonic()
        try:
            outcome = check()
        except Exception as error:  # whatever a stranger's file leads to, in our code and others'
            lines = str(error).strip().splitlines() or [type(error).__name__]
            named = "" if isinstance(error, UserError | OSError | FloatingPointError) else f"{type(error).__name__}: "
            outcome = Outcome("failed", named + lines[0])
        details = list(outcome.details)
        if len(details) > _MOST_DETAILS:
            details = [*details[:_MOST_DETAILS], f"and {len(details) - _MOST_DETAILS} more"]
        self.checks.append(
            Check(
                name=name,
                status=outcome.status,
                bound=bound,
                value=outcome.value,
                seconds=round(time.monotonic() - started, 3),
                details=tuple(details),
                allowed=outcome.status == "not run" and outcome.missing in self.options.allowed,
            )
        )
        self.on_check(self.checks[-1])

    # What the checks share.

    @cached_property
    def _stored(self) -> dict[str, Any]:
        return open_params(self.checkpoint)

    @cached_property
    def _llama_cpp(self) -> Any:
        module = references.find("llama_cpp")
        if module is not None:
            references.quiet(module)
        return module

    @cached_property
    def _windows(self) -> Windows:
        directory = self.checkpoint.tokenizer_dir
        tokenizer = load_tokenizer((directory / TOKENIZER).read_bytes(), str(directory))
        ids = tokenizer.encode(self.options.text, add_special_tokens=False).ids
        added = tokenizer.encode("").ids
        context = min(CONTEXT, self._model.max_position_embeddings)
        return half_windows(ids, added[0] if added else None, context, self.options.windows)

    @cached_property
    def _passes(self) -> Passes:
        return Passes(self._model, self.mesh, self.options.dtype, self._windows)

    @cached_property
    def _reference(self) -> np.ndarray:
        """The checkpoint's logits on the sample, in a file."""
        params = restore_params(self.checkpoint, self.mesh, self.options.dtype)
        return self._passes.write(params, self._scratch / "checkpoint.npy")

    @property
    def _model(self) -> Any:
        return self.checkpoint.meta.model

    # The checks.

    def _finite(self) -> Outcome:
        return judged(weights.not_finite(self._stored, self._model), f"{len(slots(self._model))} tensors")

    def _intact(self) -> Outcome:
        found = [verify_hf(self.exports.hf)] if self.exports.hf else []
        found += [verify_gguf(file) for file in self.exports.ggufs.values()]
        wrong = [str(damage) for verification in found for damage in verification.damages]
        count, size = sum(part.files for part in found), sum(part.bytes for part in found)
        return judged(wrong, f"{count} files, {size:,} bytes")

    def _base(self) -> Outcome:
        if self.base is None:
            return Outcome("passed", "the run began with random weights: there is no base")
        if self.base.files is None:
            return Outcome(
                "not run",
                "",
                [f"the base {self.base.name} is no HF directory or GGUF file here; name it with --base"],
                "base",
            )
        found = bases.round_trip(self.base.files, self._scratch)
        return judged(found.differences, f"{self.base.name}: {found.num_tensors} tensors")

    def _hf_weights(self) -> Outcome:
        if self.exports.hf is None:
            return Outcome("not run", "", ["there is no Hugging Face export"], "hf")
        config = model_config_from_hf(read_json(self.exports.hf / "config.json"), "config.json")
        wrong = [] if shape_of(config) == shape_of(self._model) else ["config.json describes another model"]
        found = weights.compare_hf(self._stored, self._model, self.exports.hf)
        return judged([*wrong, *found.differences], f"{found.num_tensors} tensors, {', '.join(sorted(found.kinds))}")

    def _gguf_weights(self) -> Outcome:
        if not self.exports.ggufs:
            return Outcome("not run", "", ["there is no GGUF export"], "gguf")
        wrong, count, sampled = [], 0, 0
        for file in self.exports.ggufs.values():
            found = weights.compare_gguf(self._stored, self._model, file)
            wrong += [f"{file.name}: {line}" for line in [*self._strange_metadata(file), *found.differences]]
            count, sampled = count + found.num_tensors, sampled + found.num_sampled
        part = f", of {sampled} the first {weights.SAMPLED_VALUES} values" if sampled else ""
        return judged(wrong, f"{count} tensors of {len(self.exports.ggufs)} files{part}")

    def _strange_metadata(self, file: Path) -> Iterator[str]:
        metadata, stored = gguf_file.read(file)
        if shape_of(model_config_from_gguf(metadata, stored, file.name)) != shape_of(self._model):
            yield "its metadata describe another model"
        for key, expected in (("recipe_hash", self._recipe_hash), ("step", self.checkpoint.step)):
            found = metadata.get(f"tlite_jax.{key}")
            if found is not None and expected is not None and found != expected:
                yield f"tlite_jax.{key} is {found}, the checkpoint's is {expected}"

    def _token_ids(self) -> Outcome:
        encoders = token_ids.encoders(self.checkpoint.tokenizer_dir, self.exports, self._llama_cpp)
        texts = token_ids.cases(self.checkpoint.tokenizer_dir)
        count, wrong = token_ids.differences(encoders, texts)
        return judged(wrong, f"{count:,} ids of {len(texts)} texts, {len(encoders)} encoders")

    def _logits_bound(self) -> str:
        if self.options.dtype == "float32":
            return (
                f"float32: difference <= {references.FLOAT32_BOUND:g} of the largest logit; bfloat16: RMS distance "
                f"from float32 <= {references.MOST_TIMES_WORSE:g} of Transformers' own"
            )
        return f"bfloat16: RMS difference <= {references.BFLOAT16_BOUND:g} of the logits'"

    def _hf_logits(self) -> Outcome:
        if self.exports.hf is None:
            return Outcome("not run", "", ["there is no Hugging Face export"], "hf")
        if references.find("torch") is None:
            return Outcome("not run", "", ["PyTorch is not installed: pip install 'tlite_jax[torch]'"], "torch")
        tokenizer = self.load(self.exports.hf)
        windows = whole_windows([tokenizer.encode(documents(name)[0]) for name in LANGUAGES], self._logits_length)
        imported = import_hf(self.exports.hf)
        found = {}
        for dtype in ("float32", "bfloat16") if self.options.dtype == "float32" else ("bfloat16",):
            params = place_params(imported.params, param_specs(self._model), self.mesh, dtype)
            ours = np.stack(list(Passes(self._model, self.mesh, dtype, windows).logits(params)))
            del params
            theirs = references.transformers_logits(self.exports.hf, windows.tokens, dtype)
            found[dtype] = ours, np.stack(list(theirs))
        values, wrong = references.judge_logits(found)
        return judged(wrong, "; ".join([*values, f"{windows.tokens.size} tokens"]))

    @property
    def _logits_length(self) -> int:
        return min(LOGITS_TOKENS, self._model.max_position_embeddings)

    def _f16(self) -> Outcome:
        file = self.exports.ggufs.get("F16")
        if file is None:
            return Outcome("not run", "", ["there is no F16 GGUF file"], "gguf")
        if self._llama_cpp is not None:
            engine = "llama.cpp"
            measured = references.llama_cpp_compare(self._llama_cpp, file, self._windows, self._reference)
        else:
            engine = "our importer and model (llama-cpp-python is not installed)"
            params = self._read(file)
            measured = self._passes.compare(params, self._reference)
        kl, same = float(measured["kl"].mean()), float(measured["same_top"].mean())
        most_kl, least_same_top = F16_BOUNDS[self.options.dtype]
        fine = kl <= most_kl and same >= least_same_top
        value = f"mean KL {kl:.2e}, same top {same:.2%}, {len(measured['kl'])} tokens; through {engine}"
        return judged([] if fine else [f"beyond the bound: {value}"], value)

    def _quantizations(self) -> Outcome:
        if not self.exports.ggufs:
            return Outcome("not run", "", ["there is no GGUF export"], "gguf")
        base = self._reference
        f16 = self.exports.ggufs.get("F16")
        if f16 is not None:
            base = self._passes.write(self._read(f16), self._scratch / "f16")
        found = quantizations.measure(
            self.exports.ggufs, lambda file: self._passes.compare(self._read(file), base), self._quantized_base()
        )
        if not found.rows:
            return judged(found.broken, "nothing that could be compared")
        self.table = QuantizationTable(
            base="checkpoint" if f16 is None else "F16",
            base_perplexity=found.base_perplexity,
            base_perplexity_error=found.base_perplexity_error,
            context=self._windows.tokens.shape[1],
            num_windows=len(self._windows),
            num_tokens=len(self._windows) * self._windows.num_scored,
            sample=self.options.text_name,
            rows=tuple(found.rows),
        )
        far = table.too_far(found.rows, self.options.most_kl, BFLOAT16_KL if self.options.dtype == "bfloat16" else 0.0)
        value = f"{len(found.rows)} files, {self.table.num_tokens} tokens, base {self.table.base}"
        return judged([*found.broken, *far], value, found.notes)

    def _read(self, file: Path) -> Any:
        return read_gguf(file, self._model, self.mesh, self.options.dtype)

    def _quantized_base(self) -> Path | None:
        files = None if self.base is None else self.base.files
        return files if files is not None and files.is_file() else None

    def _generation(self) -> Outcome:
        wrong, values = [], []
        expected: list[Sequence[int]] = []
        tokenizer = self.load(self.checkpoint.tokenizer_dir)
        model = LanguageModel(None, self._model, self.mesh, tokenizer, dtype=self.options.dtype)
        for source, model.params in self._writers():
            written = writing.continuations(model, source)
            self.generated += [generated for generated, _ in written]
            wrong += [f"{source} writes nothing after {text.prompt!r}" for text, ids in written if not ids]
            wrong += [
                f"{source} loops from the start after {text.prompt!r}: {text.text[:60]!r}"
                for text, ids in written
                if writing.is_degenerate(ids)
            ]
            if expected:
                alike = [writing.agreement(ids, first) for (_, ids), first in zip(written, expected, strict=True)]
                values.append(f"{source}: the first {', '.join(map(str, alike))} tokens as the checkpoint's")
            expected = expected or [ids for _, ids in written]
        return judged(wrong, "; ".join([f"{len(writing.PROMPTS)} prompts, {writing.NUM_TOKENS} tokens", *values]))

    def _writers(self) -> Iterator[tuple[str, Any]]:
        yield "checkpoint", restore_params(self.checkpoint, self.mesh, self.options.dtype)
        for file in list(self.exports.ggufs.values())[:1]:
            yield file.name, self._read(file)

    def _forgetting(self) -> Outcome:
        found = forgetting.read(self.checkpoint)
        if not found.limits:
            return Outcome("passed", f"no limits are set; {found.summary}")
        return judged(found.broken, found.summary, [line for line in found.limits if line not in found.broken])

    # The outcome.

    @property
    def _recipe_hash(self) -> str | None:
        config = self.checkpoint.meta.config
        return digest(config) if config else None

    def _result(self) -> ReleaseResult:
        dtype: Any = self.options.dtype
        return ReleaseResult(
            passed=not any(check.holds_up for check in self.checks),
            checkpoint=str(self.checkpoint.path),
            step=self.checkpoint.step,
            base=None if self.base is None else self.base.name,
            recipe_hash=self._recipe_hash,
            num_parameters=sum(int(np.prod(slot.shape)) for slot in slots(self._model)),
            compute_dtype=dtype,
            checks=tuple(self.checks),
            quantizations=self.table,
            generated=tuple(self.generated),
            files=hashed(self.exports, self.directory),
            versions=_versions(),
        )


def _versions() -> dict[str, str]:
    found = {"tlite_jax": tlite_jax.__version__}
    for name in ("jax", "transformers", "torch", "gguf", "llama_cpp"):
        module = references.find(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found
