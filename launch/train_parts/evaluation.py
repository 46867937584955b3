"""Evaluation inside a training run: opens what its config names, measures the base once, and hands it to the loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tlite_jax.config import ModelConfig, RunConfig
    from tlite_jax.data.buckets import HeldOutBucket
    from tlite_jax.data.tokenize import TokenizerFile
    from tlite_jax.evaluate.base import Base
    from tlite_jax.evaluate.bits_per_byte import Evaluator, Sample
    from tlite_jax.evaluate.board import Measurement
    from tlite_jax.evaluate.divergence import DivergenceMeter, ReplaySample
    from tlite_jax.evaluate.in_loop import InLoopEvaluation, Keys
    from tlite_jax.train.run import Run


class _Text(NamedTuple):
    """What is measured."""

    buckets: "list[HeldOutBucket]"
    sample: "Sample"
    replay: "ReplaySample | None"


def check_evaluation(config: "RunConfig") -> None:
    """Refuses a watch or an objective that no held-out bucket matches, before a run's directory is claimed.

    Raises:
      UserError: naming the labels that there are.
    """
    from tlite_jax.data.buckets import BucketStore, HeldOutBucket
    from tlite_jax.evaluate.board import Board, Measurement
    from tlite_jax.evaluate.groups import matching

    if config.evaluation.every is None:
        return
    manifests = [bucket.manifest for bucket in BucketStore.open(config.data.buckets).buckets.values()]
    buckets = [
        HeldOutBucket(manifest["name"], manifest["labels"], manifest["never_trained"], ())
        for manifest in manifests
        if manifest["held_out_documents"]
    ]
    if not buckets:
        raise UserError(
            f"evaluation.every is set, but {config.data.buckets} holds no held-out documents; prepare with "
            "data.prepare.held_out.fraction > 0, or set evaluation.every: null"
        )
    sampled = matching(config.evaluation.kl.select, buckets) if config.evaluation.kl else []
    Board(buckets, [bucket.name for bucket in sampled], config.evaluation, Measurement({}, {}))


def make_evaluation(run: "Run", mesh: "Mesh") -> "InLoopEvaluation":
    """What the loop calls, for a run whose config has `evaluation.every`; collective over all processes.

    Raises:
      UserError: no held-out text, a sample larger than it, or a base that cannot be compared with.
    """
    from launch.train_parts.evaluation_text import make_text_evaluation
    from tlite_jax.checkpoint import steps_on_disk
    from tlite_jax.evaluate.board import Board, Measurement
    from tlite_jax.evaluate.in_loop import InLoopEvaluation

    config = run.config
    assert config.evaluation.every is not None
    tokenizer = _tokenizer(config)
    text = _text(config, tokenizer)
    scorer = _scorer(config, config.model, mesh, tokenizer)
    meter = _meter(run, mesh, text)
    keys, base, starts = _base(run, mesh, tokenizer, text, scorer, meter)
    board = Board(text.buckets, text.replay.names if text.replay else (), config.evaluation, base)
    sample, tasks = make_text_evaluation(config, run.directory / "tokenizer", mesh)
    costs = {
        "evaluation_tokens": float(text.sample.packing.num_scored),
        "evaluation_padding_share": scorer.padding_share(text.sample),
    }

    def measure(params: Any) -> "tuple[Measurement, Mapping[str, float]]":
        scores = scorer.score_sample(params, text.sample)
        return Measurement(scores, {} if meter is None else meter.measure(params)), costs

    return InLoopEvaluation(
        run.directory,
        board,
        keys,
        measure,
        start=base if starts else None,
        sample=sample,
        tasks=tasks,
        every=config.evaluation.every,
        total_steps=run.total_steps,
        start_step=run.start_step if run.resumed else None,
        held=steps_on_disk(run.directory),
    )


def _tokenizer(config: "RunConfig", directory: Path | None = None) -> "TokenizerFile":
    from tlite_jax.data.tokenize import load_tokenizer

    assert config.data.tokenizer is not None
    return load_tokenizer(directory or config.data.tokenizer, config.data.document_start, config.data.document_end)


def _text(config: "RunConfig", tokenizer: "TokenizerFile") -> _Text:
    from tlite_jax.data.buckets import read_held_out
    from tlite_jax.evaluate.bits_per_byte import make_sample
    from tlite_jax.evaluate.divergence import replay_sample
    from tlite_jax.evaluate.groups import group_of, matching
    from tlite_jax.evaluate.rows import Boundaries

    wanted, length = config.evaluation, config.data.sequence_length
    boundaries = Boundaries(tokenizer.document_start, tokenizer.document_end)
    buckets = [
        bucket
        for bucket in read_held_out(config.data.buckets)
        if any(document.num_bytes for document in bucket.documents)
    ]
    sample = make_sample(buckets, boundaries, length, max_tokens=wanted.max_tokens, max_bytes=wanted.max_bytes)
    if wanted.kl is None:
        return _Text(buckets, sample, None)
    group_of(wanted.kl.select, buckets, "evaluation.kl.select")
    chosen = matching(wanted.kl.select, buckets)
    return _Text(buckets, sample, replay_sample(chosen, boundaries, num_tokens=wanted.kl.tokens, length=length))


def _scorer(config: "RunConfig", model: "ModelConfig | None", mesh: "Mesh", tokenizer: "TokenizerFile") -> "Evaluator":
    from tlite_jax.evaluate.bits_per_byte import Evaluator

    assert model is not None
    return Evaluator(
        model,
        config.execution,
        mesh,
        sequence_length=config.data.sequence_length,
        batch_size=config.evaluation.batch_size,
        start=tokenizer.document_start,
        end=tokenizer.document_end,
    )


def _meter(run: "Run", mesh: "Mesh", text: _Text) -> "DivergenceMeter | None":
    from tlite_jax.evaluate.base_files import KL_DIRECTORY
    from tlite_jax.evaluate.divergence import DivergenceMeter

    config = run.config
    if text.replay is None:
        return None
    assert config.model is not None
    return DivergenceMeter(
        config.model,
        config.execution,
        mesh,
        sample=text.replay,
        batch_size=config.evaluation.batch_size,
        directory=run.directory / KL_DIRECTORY,
    )


def _base(
    run: "Run",
    mesh: "Mesh",
    tokenizer: "TokenizerFile",
    text: _Text,
    scorer: "Evaluator",
    meter: "DivergenceMeter | None",
) -> "tuple[Keys, Measurement, bool]":
    """What was, or is now, measured of the base; and whether the run starts as the base."""
    from tlite_jax.evaluate.base import find_base, fingerprint
    from tlite_jax.evaluate.base_files import BaseFiles
    from tlite_jax.evaluate.board import Measurement
    from tlite_jax.evaluate.in_loop import Keys

    config = run.config
    base = find_base(config, run.directory)
    if base.checkpoint is not None:
        _check_base(config, base, tokenizer)
    model = base.checkpoint.meta.model if base.checkpoint is not None else config.model
    assert model is not None
    files = BaseFiles(
        run.directory,
        None if config.init_from is None else config.init_from.path,
        name=base.name,
        fingerprint=base.fingerprint,
        dtype=config.execution.compute_dtype,
        params=lambda: _base_params(config, base, mesh),
    )
    if model != config.model:
        scorer = _scorer(config, model, mesh, tokenizer)
    scores = files.scores(text.sample, lambda params: scorer.score_sample(params, text.sample))
    starts = base.is_random or (run.base is not None and fingerprint(run.base) == base.fingerprint)
    if meter is None or text.replay is None or config.evaluation.kl is None:
        return Keys(files.score_key(text.sample), None), Measurement(scores, {}), starts
    top_k = min(config.evaluation.kl.top_k, model.vocab_size)
    kl_key = files.distributions(text.replay, meter, model, top_k)
    meter.open_base()
    return Keys(files.score_key(text.sample), kl_key), Measurement(scores, meter.nowhere()), starts


def _check_base(config: "RunConfig", base: "Base", tokenizer: "TokenizerFile") -> None:
    assert base.checkpoint is not None
    assert config.model is not None
    theirs = base.checkpoint.meta.model.vocab_size
    if theirs != config.model.vocab_size:
        raise UserError(
            f"evaluation.base {base.name} has a vocabulary of {theirs}, the run's has {config.model.vocab_size}; "
            "choose a base with the run's tokenizer"
        )
    if _tokenizer(config, base.checkpoint.tokenizer_dir).hash != tokenizer.hash:
        raise UserError(f"evaluation.base {base.name} has another tokenizer than the run; choose one with the same")


def _base_params(config: "RunConfig", base: "Base", mesh: "Mesh") -> Any:
    from tlite_jax.checkpoint import restore_params
    from tlite_jax.train.state import init_state

    if base.checkpoint is not None:
        return restore_params(base.checkpoint, mesh)
    if not base.is_random:
        raise UserError(
            f"{base.name}, the base to compare with, is gone, and was measured on other text or in another dtype; "
            "restore it, or set evaluation.base"
        )
    assert config.model is not None
    return init_state(config.model, mesh, config.seed).params
