"""A recipe as a graph: arrows, each a command with what it reads and what it makes."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlite_jax.config import RunConfig, digest
from tlite_jax.config.recipe import RecipeConfig, TasksConfig
from tlite_jax.config_files import load_config
from tlite_jax.errors import UserError

Kind = Literal["fetch", "import", "prepare", "train", "evaluate", "export", "gate", "card"]

STEPS_KEY = "(train.steps)"


@dataclass(frozen=True)
class Arrow:
    """One command of a recipe.

    Attributes:
      command: words behind `python -m launch`.
      values: name -> what of the recipe and its configs decides the result.
      reads: files, directories or patterns; those of other arrows' `makes` are the edges of the graph.
      makes: files and directories.
      stdout: where standard output goes, if it is the result.
      resumes: whether it goes on with what an interrupted start left; otherwise that is removed first.
    """

    name: str
    kind: Kind
    command: tuple[str, ...]
    values: Mapping[str, str]
    reads: tuple[str, ...]
    makes: tuple[Path, ...]
    stdout: Path | None = None
    resumes: bool = False
    run: RunConfig | None = field(default=None, compare=False)


def assembled(recipe: RecipeConfig) -> Path:
    """Where the release is put together; it is renamed to `released` when the gate has passed."""
    return recipe.output / "release.partial"


def released(recipe: RecipeConfig) -> Path:
    """The release."""
    return recipe.output / "release"


def build(recipe: RecipeConfig, path: Path) -> list[Arrow]:
    """The arrows, each behind those it depends on.

    Args:
      recipe: its schema's rules hold.
      path: its file, for messages and for the card's command.

    Raises:
      UserError: a stage's config is wrong, or the stages do not follow one another.
    """
    runs = [load_config(stage.config, stage.overrides) for stage in recipe.stages]
    _check_chain(recipe, runs, path)
    arrows = [
        Arrow(
            f"fetch-{part.name}",
            "fetch",
            part.command,
            {"command": " ".join(part.command)},
            (),
            part.makes,
            resumes=True,
        )
        for part in recipe.fetch
    ]
    arrows += _import(recipe, runs[0])
    for number, (stage, run) in enumerate(zip(recipe.stages, runs, strict=True), 1):
        words = (str(stage.config), *stage.overrides)
        if run.data.prepare is not None:
            arrows.append(_prepare(f"prepare{number}", words, run))
        arrows.append(_train(f"stage{number}", words, run))
    last = runs[-1].output
    evaluations = [_evaluate(part, last, recipe.output / "evaluation") for part in recipe.evaluate]
    arrows += evaluations
    exports = _exports(recipe, last)
    arrows += [*exports, _gate(recipe, last, exports), _card(recipe, path, runs, evaluations)]
    return arrows


def edges(arrows: Sequence[Arrow]) -> dict[str, tuple[str, ...]]:
    """Arrow -> those that make what it reads, in the order of `arrows`."""
    found = {}
    for arrow in arrows:
        found[arrow.name] = tuple(
            other.name
            for other in arrows
            if other.name != arrow.name and any(_touches(read, made) for read in arrow.reads for made in other.makes)
        )
    return found


def _touches(read: str, made: Path) -> bool:
    reading = Path(read).absolute()
    return reading == made.absolute() or made.absolute() in reading.parents or reading in made.absolute().parents


def run_directory(path: Path) -> Path:
    """RUN of RUN, RUN@STEP or RUN/checkpoints/STEP."""
    if path.parent.name == "checkpoints":
        return path.parent.parent
    name, separator, _ = path.name.rpartition("@")
    return path.with_name(name) if separator and name and not path.exists() else path


def _check_chain(recipe: RecipeConfig, runs: Sequence[RunConfig], path: Path) -> None:
    first = runs[0].init_from
    if recipe.base is not None and first is None:
        raise UserError(
            f"{path}: base: {recipe.stages[0].config} has no init_from, so nothing would be adapted; set it"
        )
    for number, (before, run) in enumerate(itertools.pairwise(runs), 2):
        if run.init_from is None or run_directory(run.init_from.path) != before.output:
            found = None if run.init_from is None else str(run.init_from.path)
            raise UserError(
                f"{recipe.stages[number - 1].config}: init_from.path: stage {number} must start from "
                f"stage {number - 1}, {before.output} (got {found!r})"
            )
    outputs = [str(run.output) for run in runs]
    if repeated := sorted({output for output in outputs if outputs.count(output) > 1}):
        raise UserError(f"{path}: two stages write {repeated[0]}; give each an output of its own")


def _import(recipe: RecipeConfig, run: RunConfig) -> list[Arrow]:
    if recipe.base is None or run.init_from is None:
        return []
    made = run_directory(run.init_from.path)
    revision = () if recipe.base.revision is None else ("--revision", recipe.base.revision)
    values = {"base.source": recipe.base.source, "base.revision": str(recipe.base.revision)}
    # A hub id is known by its name; a file or directory by its contents, once it is there.
    local = Path(recipe.base.source).exists() or any(
        _touches(recipe.base.source, p) for f in recipe.fetch for p in f.makes
    )
    reads = (recipe.base.source,) if local else ()
    return [Arrow("import", "import", ("import", recipe.base.source, str(made), *revision), values, reads, (made,))]


def _prepare(name: str, words: tuple[str, ...], run: RunConfig) -> Arrow:
    """Read are all files that data.prepare names, whatever for; what changes no byte of the buckets is no input."""
    assert run.data.prepare is not None
    prepare = run.data.prepare.model_dump(mode="json", exclude={"num_workers", "shard_bytes"})
    data = run.data.model_dump(mode="json", exclude={"prepare", "mixture", "declared", "document_masking"})
    values = {f"data.prepare.{key}": digest(value) for key, value in prepare.items()}
    values |= {f"data.{key}": str(value) for key, value in data.items()}
    sources = [path for source in run.data.prepare.sources for path in source.paths]
    named = [text for text in _strings(prepare) if "/" in text and Path(text).is_file()]
    reads = [path for path in [*sources, *named] if "://" not in path]
    tokenizer = run.data.tokenizer
    if tokenizer is None and run.init_from is not None:
        tokenizer = run_directory(run.init_from.path)
    reads += [] if tokenizer is None else [str(tokenizer)]
    return Arrow(
        name, "prepare", ("prepare", *words), values, tuple(dict.fromkeys(reads)), (run.data.buckets,), resumes=True
    )


def _strings(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def _train(name: str, words: tuple[str, ...], run: RunConfig) -> Arrow:
    reads = [str(run.data.buckets)]
    if run.init_from is not None:
        reads.append(str(run_directory(run.init_from.path)))
    if run.data.tokenizer is not None:
        reads.append(str(run.data.tokenizer))
    values = {f"{words[0]} (semantic hash)": run.semantic_hash(), f"{words[0]} {STEPS_KEY}": str(run.train.steps)}
    return Arrow(name, "train", ("train", *words), values, tuple(reads), (run.output,), resumes=True, run=run)


def _evaluate(part: TasksConfig, run: Path, directory: Path) -> Arrow:
    values = {f"evaluate.{key}": str(value) for key, value in part.model_dump(mode="json").items() if key != "name"}
    made = directory / part.name
    words = ["eval", str(run), "--dtype", part.dtype]
    if part.mera is not None:
        words += ["--mera", part.mera, "--mera-split", part.mera_split, "--output", str(made)]
        words += [] if part.limit is None else ["--limit", str(part.limit)]
    elif part.tasks is not None:
        words += ["--tasks", part.tasks, "--output", str(made)]
        for option, value in {
            "--num-fewshot": part.num_fewshot,
            "--limit": part.limit,
            "--include-path": part.include_path,
        }.items():
            words += [] if value is None else [option, str(value)]
    else:
        words += ["--json"] + ([] if part.max_tokens is None else ["--max-tokens", str(part.max_tokens)])
        made = made.with_suffix(".json")
    stdout = made if made.suffix == ".json" else None
    reads = [str(run)]
    reads += [] if part.include_path is None else [str(part.include_path)]
    reads += [part.mera] if part.mera is not None and Path(part.mera).exists() else []
    return Arrow(
        f"eval-{part.name}",
        "evaluate",
        tuple(words),
        values,
        tuple(reads),
        (made,),
        stdout=stdout,
        resumes=part.mera is not None,
    )


def _exports(recipe: RecipeConfig, run: Path) -> list[Arrow]:
    export, card, place = recipe.export, recipe.card, assembled(recipe)
    hf = ["export", str(run), str(place / "hf"), "--max-shard-size", export.max_shard_size]
    hf += [] if export.dtype is None else ["--dtype", export.dtype]
    values = {"export.dtype": str(export.dtype), "export.max_shard_size": export.max_shard_size}
    arrows = [Arrow("export-hf", "export", tuple(hf), values, (str(run),), (place / "hf",))]
    if export.types:
        words = ["export", str(run), str(place / "gguf"), "--format", "gguf", "--name", recipe.name]
        words += [word for kind in export.types for word in ("--type", kind)]
        words += [] if card.license is None else ["--license", card.license]
        words += [] if card.base_model is None else ["--base-model", card.base_model]
        words += [word for code in card.languages for word in ("--language", code)]
        values = {"export.types": ", ".join(export.types), "metadata": " ".join(words[3:])}
        arrows.append(Arrow("export-gguf", "export", tuple(words), values, (str(run),), (place / "gguf",)))
    return arrows


def _gate(recipe: RecipeConfig, run: Path, exports: Sequence[Arrow]) -> Arrow:
    gate, place = recipe.gate, assembled(recipe)
    words = ["gate", str(run), "--out", str(place), "--windows", str(gate.windows), "--dtype", gate.dtype]
    words += [word for arrow in exports for word in ("--exports", str(arrow.makes[0]))]
    words += [] if gate.sample is None else ["--sample", str(gate.sample)]
    words += ["--allow-missing", ",".join(gate.allow_missing)] if gate.allow_missing else []
    words += [word for kind, value in gate.most_kl.items() for word in ("--most-kl", f"{kind}={value}")]
    values = {f"gate.{key}": str(value) for key, value in gate.model_dump(mode="json").items()}
    reads = [str(run), *(str(arrow.makes[0]) for arrow in exports)]
    reads += [] if gate.sample is None else [str(gate.sample)]
    return Arrow("gate", "gate", tuple(words), values, tuple(reads), (place / "release.json",))


def _card(recipe: RecipeConfig, path: Path, runs: Sequence[RunConfig], evaluations: Sequence[Arrow]) -> Arrow:
    place = assembled(recipe)
    values = {f"card.{key}": digest(value) for key, value in recipe.card.model_dump(mode="json").items()}
    values["name"] = recipe.name
    reads = [str(run.output) for run in runs] + [str(arrow.makes[0]) for arrow in evaluations]
    reads += [str(place / "hf"), str(place / "release.json")]
    return Arrow("card", "card", ("card", str(path)), values, tuple(reads), (place / "README.md",))
