"""A model that learns real text in eight bits loses as much as in bfloat16."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import tlite_jax
from tests.helpers import tiny_model
from tlite_jax.config import ExecutionConfig, MeshConfig, OptimizerConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.train.state import init_state
from tlite_jax.train.step import make_step

STEPS, ROWS, LENGTH = 200, 8, 64


def losses(text, **execution):
    """Of each step, on bytes of a text."""
    model = tiny_model(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
    )
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    step = make_step(model, optimizer, ExecutionConfig(**execution), mesh, schedule=lambda _: 3e-3)
    state, rng, found = init_state(model, mesh, seed=0), np.random.default_rng(0), []
    for _ in range(STEPS):
        starts = rng.integers(0, len(text) - LENGTH - 1, ROWS)
        rows = np.stack([text[start : start + LENGTH + 1] for start in starts]).astype(np.int32)
        state, metrics = step(state, {"tokens": rows[:, :-1], "targets": rows[:, 1:]})
        found.append(float(metrics["loss"]))
    return np.array(found)


def test_the_loss_is_that_of_bfloat16():
    pytest.importorskip("qwix", reason="the extra fp8 is not installed")
    sample = Path(tlite_jax.__file__).parent / "data" / "sample" / "english.jsonl"
    text = "\n".join(json.loads(line)["text"] for line in sample.read_text(encoding="utf-8").splitlines())
    data = np.frombuffer(text.encode(), np.uint8)
    bf16, fp8 = losses(data), losses(data, fp8=True)
    assert fp8[0] == pytest.approx(bf16[0], rel=0.01)
    assert bf16[-50:].mean() < 0.65 * bf16[0]  # it has learned
    assert fp8[-50:].mean() == pytest.approx(bf16[-50:].mean(), rel=0.02)
    assert not np.array_equal(fp8, bf16)
