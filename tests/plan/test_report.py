"""A plan as JSON and as text: every number that was priced is there, under the name that scripts read."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests import tiny
from tests.plan.fakes import GIB, collective, hardware, program
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.plan.cost import estimate
from tlite_jax.plan.report import Plan, assumptions, print_plan, print_search, shortfall, summarize, to_json
from tlite_jax.plan.search import Candidate
from tlite_jax.plan.topology import Domain
from tlite_jax.telemetry.throughput import num_parameters

KEYS = ("fits", "flop_ratio", "wire_ratio", "memory_ratio", "step_seconds", "tokens_per_second_per_device", "mfu")


@pytest.fixture
def config() -> RunConfig:
    """The tests' run on a mesh of 2 x 2, in bf16."""
    run = parse(RunConfig, tiny.values(Path("nowhere"), Path("run")), "test")
    return override(run, ["mesh.replica=2", "execution.compute_dtype=bfloat16"])


def plan_of(config: RunConfig, *, on_cpu: bool = False, price: float | None = None, **changes) -> Plan:
    """A plan of two gathers in the loop, one of them synchronous, and a reduction between nodes."""
    reduction = collective(
        kind="all-reduce", where="replica", group_nodes=2, dtype="f32", overlapped_flops=1e6, count=5, wire_bytes=2
    )
    step = program(collective(count=3), collective(count=2, is_async=False), reduction, **changes)
    machine = hardware(kind="cpu")
    cost = estimate(step, machine, config, nodes=2, headroom=0.1, price=price)
    return Plan(config, machine, 2, Domain(2, 2, 1, "node"), step, cost, on_cpu, price)


def printed(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=160))
    return out.getvalue()


def test_the_keys_that_scripts_read(config: RunConfig) -> None:
    plan = plan_of(config, price=2.0)
    value = json.loads(json.dumps(to_json(plan)))
    assert {*KEYS, "mfu_causal", "collectives", "hidden_share", "memory"} <= value.keys()
    assert value["fits"] is True
    assert {"arguments_bytes", "temporaries_bytes", "peak_bytes", "capacity_bytes"} <= value["memory"].keys()
    assert value["memory"]["peak_bytes"] == 7 * GIB
    assert value["memory"]["capacity_bytes"] == 10 * GIB
    assert value["memory"]["needed_bytes"] == 9 * GIB
    assert value["hidden_share"] == {"loop": pytest.approx(0.3), "edges": 1.0, "replica": 1.0}
    assert value["mesh"] == {"replica": 2, "fsdp": 2, "context": 1}
    assert value["parameters"] == num_parameters(config.model)
    assert value["step_seconds"] == pytest.approx(sum(value["seconds"].values()))
    assert value["tokens_per_second"] == pytest.approx(4 * value["tokens_per_second_per_device"])
    assert value["dollars"] == plan.cost.dollars
    assert value["upper_bound"] is False
    assert len(value["instructions"]) == 3
    assert value["instructions"][1]["hidden_seconds"] == 0.0


def test_collectives_are_added_up_by_what_they_are(config: RunConfig) -> None:
    gather, reduction = summarize(plan_of(config).cost.transfers)
    assert gather == {
        "kind": "all-gather",
        "dtype": "bf16",
        "group": "intra-node",
        "where": "loop",
        "count": 5,
        "bytes": 40,
        "seconds": 10.0,
        "hidden_share": pytest.approx(0.3),
        "overlaps": True,
    }
    assert (reduction["group"], reduction["dtype"], reduction["where"]) == ("inter-node", "f32", "replica")
    assert (reduction["count"], reduction["seconds"], reduction["hidden_share"]) == (5, 5.0, 1.0)


def test_the_text_has_the_same_numbers(config: RunConfig) -> None:
    plan = plan_of(config, price=2.0)
    text = printed(plan)
    assert "a machine: 2 nodes, 4 devices, replica 2 x fsdp 2, 2 microbatches of 32 tokens a device" in text
    rows = {line.strip().split("  ")[0].strip(): line.split() for line in text.splitlines() if "  " in line.strip()}
    assert rows["peak of the step"][-1] == "7.00"
    assert rows["unseen: context"][-1] == "1.00"
    assert rows["needed (peak, unseen, headroom)"][-1] == "9.00"
    assert rows["exposed loop"][-2:] == ["7.0000", "21.2%"]
    assert rows["step"][-2] == f"{plan.cost.step_seconds:.4f}"
    assert "loop 0.30, edges 1.00, replica 1.00" in text
    assert re.search(r"all-gather +bf16 +intra-node +loop +5 +0\.000 +10\.0000 +30%", text)
    assert "6 steps, 0.0 days, 0 dollars" in text
    assert "upper bound" not in text


def test_a_slice_is_named(config: RunConfig) -> None:
    tpu = {"kind": "tpu", "tpu": {"version": "v5e", "largest_slice": (16, 16)}}
    plan = replace(plan_of(config), hardware=hardware(**tpu), domain=Domain(1, 4, 2, "slice 2x2"))
    assert "2 nodes (1 x slice 2x2), 4 devices" in printed(plan)


def test_every_rate_is_given_with_its_source(config: RunConfig) -> None:
    plan = plan_of(config)
    text = printed(plan)
    for name in ("matmul", "attention_forward", "attention_backward", "memory", "intra_node", "inter_node"):
        assert f"source of {name}" in text
        assert any(line.startswith(f"{name} ") for line in assumptions(plan))
    assert "FLOP/s: a datasheet" in text
    assert "cost unknown, give --price" in text
    assert any(line.endswith("3: --price") for line in assumptions(plan_of(config, price=3.0)))


def test_what_is_only_a_bound_says_so(config: RunConfig) -> None:
    plan = plan_of(config, on_cpu=True)
    assert to_json(plan)["upper_bound"] is True
    assert "compiled for CPU devices: an upper bound" in printed(plan)
    assert any("nothing is seen to overlap" in line for line in assumptions(plan))


def test_a_budget_that_is_not_known_is_not_guessed(config: RunConfig) -> None:
    unknown = override(config, ["train.steps=null", "data.mixture={groups: [{select: {}, epochs: 1.0}]}"])
    assert to_json(plan_of(unknown))["days"] is None
    assert "unknown until the buckets are counted" in printed(plan_of(unknown))


def test_a_shortfall_says_by_how_much(config: RunConfig) -> None:
    plan = plan_of(config)
    large = replace(plan.cost, fit=replace(plan.cost.fit, peak_bytes=9 * GIB))
    assert shortfall(large) == (
        "does not fit: needs 11.00 GiB (step 9.00, unseen 1.00, headroom 1.00) of 10.00, 1.00 too many"
    )


def test_candidates_are_a_table(config: RunConfig) -> None:
    plan = plan_of(config)
    words = ("mesh.replica=4", "mesh.fsdp=1", "execution.remat=full")
    found = Candidate(words, override(config, words), plan.program, plan.cost)
    out = io.StringIO()
    print_search([found], Console(file=out, width=160))
    row = out.getvalue().splitlines()[-2].split()
    assert row[:7] == ["4", "x", "1", "full", "2", "3", "9.00"]
    assert row[-3] == f"{plan.cost.tokens_per_second_per_device:,.0f}"
