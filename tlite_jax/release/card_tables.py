"""The tables of a model card, as Markdown; an empty string where a run has nothing to say."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlite_jax.config import digest
from tlite_jax.release.hub import hub_name, public
from tlite_jax.release.result import ReleaseResult
from tlite_jax.report.read import RunData

_ARCHITECTURE = {
    "hidden_size": "width",
    "intermediate_size": "MLP width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "head_dim": "head width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context",
    "rope_theta": "RoPE theta",
    "rms_norm_eps": "RMSNorm eps",
    "tie_word_embeddings": "tied embeddings",
    "torch_dtype": "weights",
}
_DELTA, _BITS = "bits_per_byte_delta/", "bits_per_byte/"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]) if lines else ""


def architecture(config: Mapping[str, Any], num_parameters: int) -> str:
    """From the released config.json."""
    rows = [(words, str(config[name])) for name, words in _ARCHITECTURE.items() if name in config]
    norm = "A Llama decoder: RMSNorm before each part, SwiGLU, rotary positions, grouped-query attention."
    return f"{norm}\n\n" + table(("", ""), [("parameters", f"{num_parameters:,}"), *rows])


def hyperparameters(run: RunData) -> str:
    """Of a stage, from its config."""
    config = run.config
    batch = config.train.batch_size * config.data.sequence_length
    optimizer, schedule = config.optimizer, config.schedule
    rows = [
        ("steps", f"{run.step:,}" + ("" if run.total_steps in (None, run.step) else f" of {run.total_steps:,}")),
        ("tokens", f"{run.step * batch:,}"),
        ("batch", f"{config.train.batch_size} x {config.data.sequence_length} = {batch:,} tokens"),
        ("optimizer", f"decoupled AdamW, betas {optimizer.beta1}, {optimizer.beta2}, eps {optimizer.eps:g}"),
        ("learning rate", f"{optimizer.learning_rate:g}, {schedule.name}, {schedule.warmup_steps} warm-up steps"),
        ("weight decay", f"{optimizer.weight_decay:g} (decoupled), on {optimizer.weight_decay_on}"),
        ("gradient clipping", str(optimizer.max_gradient_norm)),
        ("precision", f"{config.execution.compute_dtype}; float32 masters"),
        ("seed", str(config.seed)),
    ]
    losses = [record["loss"] for record in run.records if "loss" in record]
    if losses:
        rows.append(("loss", f"{losses[0]:.4f} at the first logged step, {losses[-1]:.4f} at the last"))
    return table(("", ""), rows)


def ledger(run: RunData) -> str:
    """Tokens planned and consumed, per bucket."""
    length = run.config.data.sequence_length
    rows = []
    for part in run.consumed:
        labels = ", ".join(f"{label} {value}" for label, value in part.labels.items())
        epochs = f"{part.consumed / part.rows:.3f}" if part.rows else "-"
        rows.append((part.name, labels, f"{part.planned * length:,}", f"{part.consumed * length:,}", epochs))
    total = [sum(getattr(part, name) for part in run.consumed) * length for name in ("planned", "consumed")]
    rows += [("**all**", "", f"{total[0]:,}", f"{total[1]:,}", "")] if rows else []
    return table(("bucket", "labels", "tokens planned", "tokens consumed", "epochs"), rows)


def forgetting(run: RunData) -> str:
    """Bits per byte of held-out text under the base and at the last evaluation."""
    last = next((record for record in reversed(run.records) if any(name.startswith(_DELTA) for name in record)), None)
    if last is None:
        return ""
    rows = []
    for name, delta in last.items():
        if name.startswith(_DELTA):
            group = name.removeprefix(_DELTA)
            now = last[_BITS + group]
            rows.append((group, f"{now - delta:.4f}", f"{now:.4f}", f"{delta:+.4f}"))
    intro = (
        f"Bits per byte of held-out text at step {last['step']:,}, against the model that the stage is compared with."
    )
    return f"{intro} Below 0: better.\n\n{table(('held-out text', 'base', 'now', 'change'), rows)}"


def hardware(run: RunData) -> str:
    """Goodput, throughput and what it ran on."""
    rows = []
    speeds = sorted(record["tokens_per_second"] for record in run.records if "tokens_per_second" in record)
    if speeds:
        rows.append(("tokens a second, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    utilisation = sorted(record["mfu"] for record in run.records if "mfu" in record)
    if utilisation:
        rows.append(("MFU, median", f"{utilisation[len(utilisation) // 2]:.3f}"))
    if run.account is not None:
        rows.append(("wall-clock", f"{run.account.seconds:,.0f} s"))
        rows.append(("starts", str(len(run.account.starts))))
        rows.append(("goodput", f"{run.account.goodput:.1%}"))
        environment = run.account.starts[-1].environment
        shown = ("devices", "processes", "mesh", "jax", "python", "tlite_jax")
        rows += [(name, _said(environment[name])) for name in shown if name in environment]
    return table(("", ""), rows)


def _said(fact: object) -> str:
    return " x ".join(f"{name} {size}" for name, size in fact.items()) if isinstance(fact, dict) else str(fact)


def quantizations(result: ReleaseResult) -> str:
    """As the gate measured them."""
    measured = result.quantizations
    if measured is None:
        return "No GGUF files were measured."
    rows = [
        (
            row.type,
            f"{row.bytes / 1e6:,.1f} MB",
            f"{row.bits_per_weight:.2f}",
            f"{row.perplexity:.4f} ± {row.perplexity_error:.4f}",
            f"{row.mean_kl:.5f} ± {row.mean_kl_error:.5f}",
            f"{row.same_top:.2%}",
        )
        for row in measured.rows
    ]
    base = f"Against {measured.base}, perplexity {measured.base_perplexity:.4f} ± {measured.base_perplexity_error:.4f}"
    intro = f"{base}: {measured.num_windows} windows of {measured.context} tokens, {measured.num_tokens:,} scored; "
    head = ("type", "size", "bits a weight", "perplexity", "KL (nats a token)", "same top token")
    return f"{intro}{measured.sample}.\n\n{table(head, rows)}"


def checks(result: ReleaseResult) -> str:
    """The gate's."""
    verdict = "The release passed its gate." if result.passed else "**The release did not pass its gate.**"
    rows = [(check.name, check.status, public(check.value or "; ".join(check.details))) for check in result.checks]
    return f"{verdict} Passes were computed in {result.compute_dtype}.\n\n{table(('check', '', 'found'), rows)}"


def files(result: ReleaseResult, stages: Sequence[RunData]) -> str:
    """Hashes: of the files, and of the configs they come from."""
    rows = [(hub_name(file.path), f"{file.bytes:,}", f"`{file.sha256}`") for file in result.files]
    hashes = [
        (run.directory.name, f"`{digest(run.config.model_dump(mode='json'))}`", f"`{run.config.semantic_hash()}`")
        for run in stages
    ]
    configs = table(("stage", "config", "semantic"), hashes)
    return f"{table(('file', 'bytes', 'SHA-256'), rows)}\n\n{configs}\n\nStep {result.step:,} of the last stage."
