"""The benchmark against torch on one GPU, at toy size on a CPU: both contenders, and what is made of their numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from bench import _ceilings, _gpu_jax, _gpu_problem, _gpu_report, _gpu_torch
from tlite_jax.config import MeshConfig
from tlite_jax.sharding import make_mesh
from tlite_jax.telemetry.throughput import flops_per_token, num_parameters

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "bench/gpu_step.py"), "--toy", "--device", "cpu"]


def problem(*, shape=_gpu_problem.LLAMA_3_8B, sequence=8192, microbatches=8, **changes) -> _gpu_problem.Problem:
    values = {"layers": (4, 8, 12), "chunk_tokens": 2048, "dtype": "bfloat16", "device": "cpu", "repeats": 1}
    values |= {"deadline": math.inf, "cache": "", "torch_backend": "eager", "execution": {}}
    return _gpu_problem.Problem(shape=shape, sequence=sequence, microbatches=microbatches, **{**values, **changes})


def toy(**changes) -> _gpu_problem.Problem:
    settings = {"layers": (2,), "chunk_tokens": 16, "dtype": "float32", "sequence": 32, "microbatches": 2}
    return problem(shape=_gpu_problem.TOY, **{**settings, **changes})


def measured(layers: int, **changes) -> _gpu_report.Measured:
    depth = {"event": "depth", "layers": layers, "losses": [12.5, 12.4], "gradient_norm": 3.0}
    result = _gpu_report.Measured()
    result.add({**depth, **changes})
    return result


def test_both_contenders_agree_and_the_table_is_printed(tmp_path):
    options = ["--layers", "1,2", "--turns", "1", "--repeats", "2", "--hardware", "H200", "--cache", str(tmp_path)]
    quick = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=300, check=False, env=quick)
    assert done.returncode == 0, done.stderr
    assert "2 layers, gradient_norm: ours" in done.stdout
    assert "| torch | 32 (fitted) |" in done.stdout
    summary = json.loads(done.stdout.splitlines()[-1])
    assert [(row["contender"], row["layers"]) for row in summary["rows"]] == [
        (name, layers) for name in ("ours", "torch") for layers in (1, 2, 32)
    ]
    fitted = [row for row in summary["rows"] if row["layers"] == 32]
    noisy = [row for row in fitted if "not_meaningful" in row]  # on a busy machine two layers may take less than one
    assert all(f"{row['contender']}: fit not meaningful: {row['not_meaningful']}" in done.stdout for row in noisy)
    for row in (row for row in summary["rows"] if row not in noisy):
        assert row["mfu"] > row["mfu_causal"] > 0
        assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])


def test_a_run_without_time_fails_and_says_what_to_give():
    done = subprocess.run([*COMMAND, "--minutes", "0.17"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "--minutes" in done.stderr


def test_both_frameworks_make_the_same_bits():
    model = toy().model(2)
    ours = _gpu_jax.make_weights(model, make_mesh(MeshConfig(), jax.devices()[:1]))
    theirs = _gpu_torch._masters(model, "cpu")
    flat = {**{name: ours[name] for name in ("embedding", "head", "final_norm")}, **ours["blocks"]}
    assert flat.keys() == theirs.keys()
    for name, weight in flat.items():
        np.testing.assert_array_equal(np.asarray(weight), theirs[name].numpy(), err_msg=name)
    assert float(np.std(flat["gate"])) == pytest.approx(0.02, rel=0.02)
    assert not np.array_equal(flat["gate"][0], flat["gate"][1])


def test_torch_computes_every_product_once():
    """Selective checkpointing under compile: what is recomputed is elementwise."""
    products = []

    def count(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        products.append((sum("mm" in name for name in names), sum("attention" in name for name in names)))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    given = toy()
    model = given.model(1)
    block = _gpu_torch.make_block(model, False, lambda call: torch.compile(call, fullgraph=True, backend=backend))
    weights = [weight.requires_grad_() for weight in _weights_of_a_layer(model)]
    x_BTD = torch.randn(1, given.sequence, model.hidden_size, requires_grad=True)
    block(x_BTD, *_gpu_torch._rope_tables(model, given.sequence, "cpu"), *weights).sum().backward()
    assert products == [(7, 1), (14, 1)]


def _weights_of_a_layer(model):
    shapes = _gpu_problem.parameter_shapes(model)
    return [_gpu_torch.make_weight(shapes[name], name, 0, "cpu") for name in _gpu_torch.BLOCK_NAMES]


def test_the_floor_is_that_of_facts_at_their_rates():
    """One H200: 57.0 us a token of products at 790 TFLOP/s, 14.8 of attention; 8B by its own counts."""
    given = problem()
    gemm = dict.fromkeys(_ceilings.products(given), 790e12)
    terms = _gpu_report.floor(given, 32, _gpu_report.Ceilings(gemm, attention=14.8e-6 / 32 * 8192, copy=4.3e12))
    per_token = {name: seconds / given.tokens_per_step * 1e6 for name, seconds in terms.items()}
    assert per_token["matmul"] == pytest.approx(57.0, abs=0.05)
    assert per_token["attention"] == pytest.approx(14.8)
    assert 3.5 < per_token["elementwise"] < 5.0
    assert per_token["update"] * 65536 / 1e6 == pytest.approx(8_030_261_248 * 34 / 4.3e12)


def test_products_are_the_needed_flops():
    given = problem()
    model = given.model(12)
    flops = sum(
        product.flops(1) * (12 * product.per_layer + product.once) for product in _ceilings.products(given).values()
    )
    assert flops == flops_per_token(model, 0).mfu_causal
    shapes = _gpu_problem.parameter_shapes(model)
    blocks = sum(math.prod(shapes[name]) for name in _gpu_torch.BLOCK_NAMES)
    rest = sum(math.prod(shapes[name]) for name in ("embedding", "head", "final_norm"))
    assert 12 * blocks + rest == num_parameters(model)


def test_a_line_is_checked_by_the_depth_between():
    assert _gpu_report.fit({4: 1.5, 8: 2.5, 12: 3.5}) == (0.5, 0.25, 0.0)
    line = _gpu_report.fit({12: 3.5, 8: 2.0, 4: 1.5})
    assert line.at(32) == 8.5
    assert line.error == pytest.approx(0.25)
    assert _gpu_report.fit({4: 1.5, 12: 3.5}).error is None
    assert _gpu_report.fit({4: 1.5}) is None


def timed(step_seconds, update_seconds):
    result = _gpu_report.Measured()
    for layers, seconds, update in zip((4, 8, 12), step_seconds, update_seconds, strict=True):
        depth = {"event": "depth", "layers": layers, "seconds": [seconds], "update_seconds": update, "peak_bytes": 1}
        result.add(depth)
    return result


@pytest.mark.parametrize(
    ("step_seconds", "update_seconds", "reason"),
    [
        ((1.5, 2.5, 3.5), (0.1, 0.2, 0.3), None),
        ((1.5, 1.4, 1.3), (0.1, 0.2, 0.3), "a step of more layers was not slower (-0.025 s a layer)"),
        ((1.5, 1.5, 1.5), (0.1, 0.2, 0.3), "a step of more layers was not slower (0 s a layer)"),
        ((1.5, 2.5, 3.5), (0.3, 0.2, 0.1), "the update of more layers was not slower"),
        ((1.5, 1.6, 1.7), (0.3, 0.7, 1.1), "the update alone would take longer than the step"),
    ],
)
def test_a_line_that_noise_made_is_not_followed(step_seconds, update_seconds, reason):
    ceilings = _gpu_report.Ceilings(dict.fromkeys(_ceilings.products(problem()), 1e12), 1e-3, 1e11)
    found = _gpu_report.rows(problem(), {"ours": timed(step_seconds, update_seconds)}, ceilings, 1e15)
    table = _gpu_report.table(found)
    assert [row["layers"] for row in found] == [4, 8, 12, 32]
    if reason is None:
        assert found[-1]["step_seconds"] == 8.5
        assert "not meaningful" not in table
    else:
        assert "step_seconds" not in found[-1]
        assert f"ours: fit not meaningful: {reason}" in table
        assert "| ours | 32 (fitted) | - |" in table


@pytest.mark.parametrize(
    "theirs",
    [
        {"losses": [12.5 * 1.0003, 12.4]},
        {"losses": [12.5, 12.4 * 1.0006]},
        {"gradient_norm": 3.02},
        {"gradient_norm": math.nan},
    ],
)
def test_contenders_that_disagree_are_not_compared(theirs):
    with pytest.raises(_gpu_report.DisagreementError, match="do not agree: 4 layers"):
        _gpu_report.check_agreement(problem(), measured(4), measured(4, **theirs))


def test_close_contenders_agree():
    close = measured(4, losses=[12.5 * 1.0001, 12.4 * 1.0004], gradient_norm=3.01)
    assert len(_gpu_report.check_agreement(problem(), measured(4), close)) == 3


def test_depths_end_when_the_next_would_not(monkeypatch, capsys):
    now = iter([0.0, 100.0, 100.0])
    monkeypatch.setattr(_gpu_problem.time, "time", lambda: next(now))
    assert list(_gpu_problem.depths_in_time(problem(deadline=219.0), "ours")) == [4]
    assert "no time left for 8 layers" in capsys.readouterr().out
