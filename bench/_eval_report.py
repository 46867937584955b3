"""What is made of the evaluation benchmark's numbers."""

import statistics
from collections.abc import Sequence
from typing import Any

from tlite_jax.config import ModelConfig
from tlite_jax.telemetry.throughput import flops_per_token

GOALS = {"choices": 1.5, "lone": 1.5, "decode, batch 1": 2.0, "decode, batch 8": 2.0}
IN_LOOP_TOKENS, EVERY, BATCH_TOKENS = 2_000_000, 250, 768 * 8192
LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
Turn = dict[str, Any]


def summarise(turns: Sequence[Turn]) -> dict[str, dict[str, float]]:
    """By what was measured: requests or tokens a second of both, and the median of ratios within a turn."""
    counting = [turn for turn in turns if turn["quiet"]] or list(turns)
    result = {}
    for name in turns[0]["answers"]:
        pairs = [turn["answers"][name] for turn in counting]
        rates = {
            who: statistics.median(pair[who]["count"] / pair[who]["seconds"] for pair in pairs)
            for who in ("ours", "theirs")
        }
        ratio = statistics.median(pair["theirs"]["seconds"] / pair["ours"]["seconds"] for pair in pairs)
        result[name] = {**rates, "ratio": ratio}
    return result


def table(summary: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown."""
    lines = ["| requests or tokens a second | ours | theirs | ours / theirs | goal |", "|---|---|---|---|---|"]
    for name, row in summary.items():
        goal = f"{GOALS[name]:.1f}" if name in GOALS else ""
        lines.append(f"| {name} | {row['ours']:.1f} | {row['theirs']:.1f} | {row['ratio']:.2f} | {goal} |")
    return "\n".join(lines)


def agreement(turns: Sequence[Turn]) -> str:
    """How far the answers differ."""
    answers = turns[-1]["answers"]
    worst, flags, equal, tokens = 0.0, 0, 0, 0
    for name in ("choices", "lone"):
        for mine, other in zip(answers[name]["ours"]["result"], answers[name]["theirs"]["result"], strict=True):
            worst = max(worst, abs(mine[0] - other[0]) / mine[2])
            flags += mine[1] != other[1]
    for name in ("decode, batch 1", "decode, batch 8"):
        mine, other = (answers[name][who]["result"] for who in ("ours", "theirs"))
        equal += sum(a == b for a, b in zip(mine, other, strict=True))
        tokens += len(mine)
    return (
        f"log-likelihoods differ by at most {worst:.1e} nats a token, {flags} greedy flags differ; "
        f"{equal} of {tokens} greedy tokens are equal"
    )


def sharing(computed_tokens: int, needed_tokens: int) -> str:
    """What requests share, less what is padding: places of rows that we computed, tokens of requests, each alone."""
    return f"ours computed {computed_tokens:,} places for requests of {needed_tokens:,} tokens"


def in_loop_cost() -> str:
    """The share of training time that evaluation takes in the 8B recipe, by arithmetic, in words."""
    flops = flops_per_token(LLAMA_3_8B, 8192).mfu_causal
    evaluated, trained = IN_LOOP_TOKENS * flops / 3, EVERY * BATCH_TOKENS * flops
    share = evaluated / trained
    return (
        f"in the 8B recipe: forward is 1/3 of forward and backward, {flops / 3e9:.2f} of {flops / 1e9:.2f} GFLOP a "
        f"token; {IN_LOOP_TOKENS / 1e6:.0f}M tokens every {EVERY} steps of {BATCH_TOKENS:,} tokens are "
        f"{evaluated / 1e15:.1f} of {trained / 1e15:,.0f} PFLOP: {share:.3%} of training at equal efficiency, "
        f"{4 * share:.2%} at a quarter of it (half the rate, and half the places padding)"
    )
