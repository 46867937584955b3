"""`python -m launch gate CHECKPOINT --out DIR`: may this be called a release, and if not, why not."""

import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.checkpoint import Checkpoint
    from tlite_jax.release.files import Exports
    from tlite_jax.release.gate import Options
    from tlite_jax.release.result import Check, ReleaseResult

EXIT_FAILED = 1
MAY_BE_MISSING = ("torch", "base", "hf", "gguf")
_EXPORTABLE = "the checkpoint can be exported"
_MARKS = {"passed": "passed ", "failed": "FAILED ", "not run": "NOT RUN"}


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run directory, or RUN/checkpoints/STEP.")],
    out: Annotated[
        Path, typer.Option(help="Release directory: release.json goes there, and exports if it makes them.")
    ],
    base: Annotated[
        str | None, typer.Option(help="HF directory, GGUF file or checkpoint; default: what the run's records say.")
    ] = None,
    exports: Annotated[
        list[Path] | None,
        typer.Option(help="HF directory, GGUF file, or a directory that holds such; may be repeated."),
    ] = None,
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", "--types", help="GGUF type to export, where --exports is not given; may be repeated."),
    ] = None,
    sample: Annotated[Path | None, typer.Option(help="UTF-8 text for the table of quantisations.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Most windows of the sample that are read.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: of every pass.")] = "float32",
    step: Annotated[str | None, typer.Option(help="Step of the run, or best; default: the newest.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, for the exports; default: the run's.")] = None,
    allow_missing: Annotated[
        str, typer.Option(help=f"What a check may go without, with commas: {', '.join(MAY_BE_MISSING)}.")
    ] = "",
    most_kl: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE=VALUE", help="Most mean KL of a type's file, nats a token; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print release.json instead of lines.")] = False,
) -> None:
    """Check a release and write release.json: weights, logits, token ids, quantisations, text, hashes.

    Ends with 0 when it may be released, 1 when it may not (each check that fails is named), 2 for bad usage.

    Example: python -m launch gate runs/stage2 --out release --type Q4_K_M --type Q8_0
    """
    started = time.monotonic()
    options = _options(dtype, sample, windows, allow_missing, most_kl or [])
    with _lines_beside_json(as_json):
        result = run_gate(
            checkpoint, out, base=base, exports=exports or [], types=type_ or [], step=step, name=name, options=options
        )
        _print(result, out, time.monotonic() - started)
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), ensure_ascii=False, indent=1))
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def run_gate(
    checkpoint: Path,
    out: Path,
    *,
    base: str | None,
    exports: list[Path],
    types: list[str],
    step: str | None,
    name: str | None,
    options: "Options",
) -> "ReleaseResult":
    """Exports if need be, checks, and writes release.json.

    Args:
      checkpoint: a run, or RUN/checkpoints/STEP.
      out: the release directory; made when absent.
      base, exports, types, step, name: as on the command line.
      options: of the checks.

    Raises:
      UserError: no such checkpoint or a damaged one, no such exports, files in the way of exports.
    """
    import jax

    from launch.language_model import load_tokenizer
    from tlite_jax.checkpoint import find
    from tlite_jax.checkpoint.verify import require_intact
    from tlite_jax.config import MeshConfig
    from tlite_jax.release.base import find_base
    from tlite_jax.release.files import find_exports
    from tlite_jax.release.gate import Gate
    from tlite_jax.release.result import FILE_NAME, save
    from tlite_jax.sharding import make_mesh

    found = find(checkpoint, step)
    require_intact(found)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a directory; choose another")
    load_tokenizer(found.tokenizer_dir)  # without one nothing can be checked
    origin = find_base(found, base)
    if exports and types:
        raise UserError("--type is for a gate that exports by itself; leave it out, or leave out --exports")
    if exports:
        released, first = find_exports(exports), _given(exports)
        _refuse_limits_of_none(options.most_kl, released.ggufs)
    else:
        _refuse_leftovers(out, types)
        _refuse_limits_of_none(options.most_kl, ["F16", *types])
        released, first = _exports(found, out, types, name)
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE_NAME).unlink(missing_ok=True)  # what it says is of other files
    gate = Gate(
        found,
        released,
        origin,
        out,
        make_mesh(MeshConfig(fsdp=jax.device_count())),
        load_tokenizer,
        options,
        on_check=_print_check,
        checks=[first],
    )
    _print_check(first)
    result = gate.run()
    save(result, out)
    return result


def _options(dtype: str, sample: Path | None, windows: int, allow_missing: str, most_kl: list[str]) -> "Options":
    from tlite_jax.release.gate import Options
    from tlite_jax.release.sample import OWN, own_text, read_text

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose float32 or bfloat16")
    allowed = frozenset(part.strip() for part in allow_missing.split(",") if part.strip())
    if unknown := sorted(allowed - set(MAY_BE_MISSING)):
        raise UserError(f"--allow-missing {unknown[0]}: choose from {', '.join(MAY_BE_MISSING)}")
    text, origin = (own_text(), OWN) if sample is None else (read_text(sample), str(sample))
    return Options(dtype, text, origin, windows, allowed, _limits(most_kl))


def _limits(given: list[str]) -> dict[str, float]:
    """TYPE=VALUE of --most-kl, read."""
    from tlite_jax.bridge.gguf_types import FILE_TYPES

    limits: dict[str, float] = {}
    for words in given:
        kind, _, number = words.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind not in FILE_TYPES or not 0 < value < math.inf:
            raise UserError(f"--most-kl {words}: give TYPE=VALUE, a number above 0, e.g. Q4_K_M=0.1")
        if kind in limits:
            raise UserError(f"--most-kl {words}: {kind} is given twice")
        limits[kind] = value
    return limits


def _refuse_limits_of_none(limits: Mapping[str, float], kinds: Collection[str]) -> None:
    """A limit that nothing would be held against is a mistake."""
    for kind in limits:
        if kind not in kinds:
            raise UserError(f"--most-kl {kind}: the release has no such file; it has {', '.join(kinds) or 'no GGUF'}")


def _refuse_leftovers(out: Path, types: list[str]) -> None:
    """Before anything is computed."""
    from tlite_jax.bridge.gguf_types import FILE_TYPES

    if unknown := [kind for kind in types if kind not in FILE_TYPES]:
        raise UserError(f"--type {unknown[0]}: choose from {', '.join(FILE_TYPES)}")
    for place in (out / "hf", out / "gguf"):
        if place.exists():
            raise UserError(f"{place} exists; check it with --exports {place}, remove it, or choose another --out")


def _given(exports: list[Path]) -> "Check":
    from tlite_jax.release.result import Check

    value = f"given: {', '.join(map(str, exports))}"
    return Check(name="exports", status="passed", bound=_EXPORTABLE, value=value, seconds=0.0)


def _exports(checkpoint: "Checkpoint", out: Path, types: list[str], name: str | None) -> "tuple[Exports, Check]":
    """Makes the release's files; a model that cannot be exported fails this check."""
    from launch.export import export_gguf_files, export_model
    from tlite_jax.bridge.gguf_metadata import ReleaseFacts
    from tlite_jax.release.files import Exports, find_exports
    from tlite_jax.release.result import Check

    started, problem = time.monotonic(), ""
    facts = ReleaseFacts(name or checkpoint.run.resolve().name)
    out.mkdir(parents=True, exist_ok=True)
    try:
        export_model(checkpoint.path, out / "hf")
        export_gguf_files(checkpoint.path, out / "gguf", ["F16", *types], facts)
    except UserError as error:
        problem = str(error)
    places = [place for place in (out / "hf", out / "gguf") if place.is_dir() and any(place.iterdir())]
    check = Check(
        name="exports",
        status="failed" if problem else "passed",
        bound=_EXPORTABLE,
        value=problem or f"made in {out}",
        seconds=round(time.monotonic() - started, 3),
    )
    return find_exports(places) if places else Exports(None, {}), check


@contextlib.contextmanager
def _lines_beside_json(as_json: bool) -> Iterator[None]:
    """Keeps lines for people out of the way of JSON: they go to standard error."""
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


def _print_check(check: "Check") -> None:
    text = check.value or "; ".join(check.details)
    print(f"{_MARKS[check.status]} {check.name:16} {text}  [{check.bound}]  {check.seconds:.1f} s", flush=True)
    for line in check.details if check.value else ():
        print(f"        {line}", flush=True)


def _print(result: "ReleaseResult", out: Path, seconds: float) -> None:
    from tlite_jax.release.table import lines

    said = io.StringIO()
    if result.quantizations is not None:
        table = result.quantizations
        print(
            f"\nagainst {table.base}, perplexity {table.base_perplexity:.3f} +-{table.base_perplexity_error:.3f}, "
            f"{table.num_windows} windows of {table.context} tokens, {table.num_tokens} scored; {table.sample}",
            file=said,
        )
        print("\n".join(lines(table)), file=said)
    for text in result.generated:
        print(f"\n{text.source}: {text.prompt}{text.text}", file=said)
    print(said.getvalue())
    stopped = [check.name for check in result.checks if check.holds_up]
    verdict = f"not a release: {', '.join(stopped)}" if stopped else "may be released"
    print(f"{out}/release.json: {verdict}; {len(result.files)} files, {seconds:.0f} s")
