"""`python -m launch eval CHECKPOINT`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlite_jax.errors import UserError

if TYPE_CHECKING:
    from tlite_jax.checkpoint import Checkpoint
    from tlite_jax.data.buckets import HeldOutBucket
    from tlite_jax.evaluate.bits_per_byte import Score


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Run directory, or one RUN/checkpoints/STEP.")],
    buckets: Annotated[Path | None, typer.Option(help="Prepared buckets; default: the run's own.")] = None,
    step: Annotated[str | None, typer.Option(help="Step of the run, or best; default: the newest.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Per bucket; default: all held out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="lm-evaluation-harness tasks, groups, patterns or YAML files, with commas.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples; default: each task's own.")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Documents of each task, or a share below 1; default: all.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for results.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of task YAML files.")] = None,
    log_samples: Annotated[bool, typer.Option("--log-samples", help="Write every document's answers.")] = False,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Prompts as a conversation.")
    ] = False,
    fewshot_as_multiturn: Annotated[bool, typer.Option(help="Examples as turns of the conversation.")] = True,
    system_instruction: Annotated[str | None, typer.Option(help="Before everything.")] = None,
    gen_kwargs: Annotated[str | None, typer.Option(help="name=value,... over each task's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of few-shot choice and of draws.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="At a time on each device; default: 4096.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of context; default: the model's.")] = None,
    mera: Annotated[str | None, typer.Option(help="Run MERA: directory of its dataset, hub, or hub@REVISION.")] = None,
    mera_version: Annotated[str, typer.Option(help="Whose prompts and rules.")] = "1.1.0",
    mera_split: Annotated[str, typer.Option(help="test, train (or public_test), or validation.")] = "test",
    mera_tasks: Annotated[str | None, typer.Option(help="Names with commas, or all 21; default: the 17.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the model writes (ruHumanEval).")
    ] = False,
) -> None:
    """Measure bits per byte on held-out text, per bucket and language; or run lm-evaluation-harness's tasks, or MERA.

    Example: python -m launch eval runs/quickstart/run --json
    Example: python -m launch eval runs/tlite_8b --tasks arc_easy,mmlu --num-fewshot 5 --output results
    Example: python -m launch eval runs/tlite_8b --mera MERA --output results
    """
    if mera is not None:
        from launch.eval_parts.mera import MeraOptions, evaluate_mera

        if tasks is not None:
            raise UserError("--tasks and --mera are two evaluations: give one of them")
        evaluate_mera(
            checkpoint,
            MeraOptions(mera, mera_version, mera_split, mera_tasks, limit, allow_code_execution),
            output,
            step=step,
            as_json=as_json,
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_length=max_length,
        )
        return
    if tasks is not None:
        from launch.eval_parts.tasks import evaluate_tasks

        evaluate_tasks(
            checkpoint,
            step=step,
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_length=max_length,
            as_json=as_json,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            output=output,
            include_path=include_path,
            log_samples=log_samples,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system_instruction=system_instruction,
            gen_kwargs=gen_kwargs,
            seed=seed,
        )
        return
    from rich.console import Console
    from rich.table import Table

    from tlite_jax.checkpoint import find
    from tlite_jax.evaluate.bits_per_byte import by_name

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: choose float32 or bfloat16")
    found = find(checkpoint, step)
    held_out, scores = score_checkpoint(found, buckets, max_tokens=max_tokens, dtype=dtype)
    rows = by_name(scores, held_out).items()
    if as_json:
        values = {
            name: {"bits_per_byte": score.bits_per_byte, "bytes": score.num_bytes, "tokens": score.num_tokens}
            for name, score in rows
        }
        print(json.dumps({"checkpoint": str(found.path), "step": found.step, "results": values}, ensure_ascii=False))
        return
    table = Table("held-out text", "bits per byte", "bytes", "tokens", title=f"{found.path}")
    for name, score in rows:
        table.add_row(name, f"{score.bits_per_byte:.4f}", f"{score.num_bytes:,}", f"{score.num_tokens:,}")
    Console().print(table)


def score_checkpoint(
    checkpoint: "Checkpoint", buckets: Path | None, *, max_tokens: int | None, dtype: str
) -> "tuple[list[HeldOutBucket], dict[str, Score]]":
    """Scores a checkpoint on all devices there are, sharded over them.

    Raises:
      UserError: no buckets known, none held out, or token ids that the model does not know.
    """
    import jax

    from tlite_jax.checkpoint import restore_params
    from tlite_jax.config import ExecutionConfig, MeshConfig
    from tlite_jax.data.buckets import BucketStore, read_held_out
    from tlite_jax.evaluate.bits_per_byte import Evaluator
    from tlite_jax.sharding import make_mesh

    if buckets is None:
        config = checkpoint.meta.config
        if config is None:
            raise UserError(f"{checkpoint.path} is an imported model, which has no buckets of its own; give --buckets")
        buckets = Path(config["data"]["buckets"])
    store = BucketStore.open(buckets)
    manifest = store.manifest
    store.check(sequence_length=manifest["sequence_length"], vocab_size=checkpoint.meta.model.vocab_size)
    held_out = read_held_out(buckets)
    if not held_out:
        raise UserError(f"{buckets} holds no held-out documents; prepare with data.prepare.held_out.fraction > 0")
    mesh = make_mesh(MeshConfig(fsdp=jax.device_count()))
    evaluator = Evaluator(
        checkpoint.meta.model,
        ExecutionConfig.model_validate_json(json.dumps({"compute_dtype": dtype})),
        mesh,
        sequence_length=manifest["sequence_length"],
        batch_size=4 * mesh.size,
        start=manifest["origin"]["document_start"],
        end=manifest["origin"]["document_end"],
    )
    return held_out, evaluator.score(restore_params(checkpoint, mesh), held_out, max_tokens)
