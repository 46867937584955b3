"""Every term of the roofline against numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.plan.fakes import GIB, collective, hardware, program
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.plan.cost import audit, estimate, exposed_seconds, fit, total_steps, transfer
from tlite_jax.telemetry.throughput import flops_per_token


@pytest.fixture
def config() -> RunConfig:
    """The tests' run; its paths are never read."""
    return parse(RunConfig, tiny.values(Path("nowhere"), Path("run")), "test")


def test_terms_are_work_over_rates(config: RunConfig) -> None:
    cost = estimate(program(), hardware(), config, nodes=2, headroom=0.0)
    assert cost.terms == pytest.approx(
        {
            "matmul": 10.0,
            "attention_forward": 2.0,
            "attention_backward": 10.0,
            "elementwise": 3.0,
            "optimizer": 1.0,
            "exposed_loop": 0.0,
            "exposed_edges": 0.0,
            "exposed_replica": 0.0,
        }
    )
    assert cost.step_seconds == pytest.approx(26.0)
    assert cost.hidden_share == {"loop": 1.0, "edges": 1.0, "replica": 1.0}
    assert cost.tokens_per_second_per_device == pytest.approx(64 / 26)
    flops = flops_per_token(config.model, config.data.sequence_length)
    assert cost.mfu == pytest.approx(64 / 26 * flops.mfu / 200)
    assert cost.mfu_causal == pytest.approx(64 / 26 * flops.mfu_causal / 200)
    assert cost.flop_ratio == pytest.approx(1350 / 1300)


def test_products_that_wait_for_memory_take_its_time(config: RunConfig) -> None:
    work = replace(program().work, matmul_bytes=200.0)
    cost = estimate(program(work=work), hardware(), config, nodes=2, headroom=0.0)
    assert cost.terms["matmul"] == pytest.approx(20.0)


def test_full_recomputation_runs_the_forward_pass_of_attention_twice(config: RunConfig) -> None:
    work = replace(program().work, attention_flops=450.0)
    full = override(config, ["execution.remat=full"])
    cost = estimate(program(work=work), hardware(), full, nodes=2, headroom=0.0)
    assert cost.terms["attention_forward"] == pytest.approx(4.0)
    assert cost.terms["attention_backward"] == pytest.approx(10.0)


def test_a_transfer_inside_a_node_takes_its_bytes_over_the_link() -> None:
    inside = transfer(collective(), hardware(), nic=2.0)
    assert (inside.seconds, inside.hidden_seconds) == (2.0, 1.0)
    assert (inside.intra_seconds, inside.inter_seconds, inside.group) == (2.0, 0.0, "intra-node")
    assert transfer(collective(is_async=False), hardware(), nic=2.0).hidden_seconds == 0.0
    assert transfer(collective(overlapped_flops=1e6), hardware(), nic=2.0).hidden_seconds == 2.0


def test_groups_of_a_node_share_its_nics() -> None:
    across = collective(group_size=2, group_nodes=2, groups_per_node=2, where="replica", kind="all-reduce")
    assert transfer(across, hardware(), nic=2.0).seconds == 8.0
    assert transfer(replace(across, groups_per_node=1), hardware(), nic=2.0).seconds == 4.0
    assert transfer(across, hardware(), nic=2.0).intra_seconds == 0.0  # one device of each node: no link is used
    # A ring over both nodes' four devices leaves a node once; with fast NICs the links are what it waits for.
    whole = replace(across, group_size=4, groups_per_node=1)
    assert transfer(whole, hardware(), nic=2.0).seconds == 4.0
    assert transfer(whole, hardware(), nic=100.0).seconds == 2.0
    assert transfer(whole, hardware(), nic=100.0).group == "inter-node"


@pytest.mark.parametrize(("kind", "rounds"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_each_step_of_a_ring_has_its_latency(kind: str, rounds: int) -> None:
    slow = hardware()
    slow = slow.model_copy(
        update={"rates": slow.rates.model_copy(update={"intra_node_hop": 0.5, "inter_node_hop": 7.0})}
    )
    ring = collective(kind=kind, group_size=6, group_nodes=3)
    assert transfer(ring, slow, nic=1e9).seconds == pytest.approx(2.0 + rounds * (3 * 0.5 + 2 * 7.0))


def test_what_is_not_hidden_is_exposed_where_it_is(config: RunConfig) -> None:
    both = program(collective(count=3), collective(where="edge", wire_bytes=4, overlapped_flops=0.0))
    cost = estimate(both, hardware(), config, nodes=2, headroom=0.0)
    assert cost.hidden_share == {"loop": pytest.approx(0.5), "edges": 0.0, "replica": 1.0}
    assert cost.transfer_seconds == {"loop": 6.0, "edges": 1.0, "replica": 0.0}
    assert cost.terms["exposed_loop"] == pytest.approx(3.0)
    assert cost.terms["exposed_edges"] == pytest.approx(1.0)
    assert cost.step_seconds == pytest.approx(30.0)
    assert cost.step_seconds == pytest.approx(sum(cost.terms.values()))


def test_collectives_on_one_wire_cannot_all_hide_behind_the_same_products() -> None:
    hiding = [transfer(collective(overlapped_flops=1e6, count=10), hardware(), nic=2.0)] * 2
    assert exposed_seconds(hiding, products=40.0)["loop"] == pytest.approx(0.0)
    assert exposed_seconds(hiding, products=15.0)["loop"] == pytest.approx(25.0)  # 40 s of transfers behind 15


def test_another_wire_is_free() -> None:
    link = transfer(collective(overlapped_flops=1e6, count=10), hardware(), nic=2.0)
    reduction = collective(where="replica", group_nodes=2, overlapped_flops=1e6, count=5)
    nic = transfer(reduction, hardware(), nic=2.0)
    assert exposed_seconds([link, nic], products=20.0) == {"loop": 0.0, "edges": 0.0, "replica": 0.0}
    # A ring through both wires is slowed by the busier one.
    ring = transfer(replace(reduction, group_size=4), hardware(), nic=2.0)
    assert exposed_seconds([link, ring], products=20.0)["replica"] > 0


def test_slices_of_several_hosts_add_their_nics(config: RunConfig) -> None:
    across = collective(where="replica", group_nodes=2, group_size=2, groups_per_node=1, overlapped_flops=0.0)
    alone = estimate(program(across), hardware(), config, nodes=2, headroom=0.0)
    paired = estimate(program(across), hardware(), config, nodes=4, headroom=0.0)
    assert alone.terms["exposed_replica"] == pytest.approx(2 * paired.terms["exposed_replica"])


def test_ratios(config: RunConfig) -> None:
    step = program(collective(count=2), minimum_wire_bytes=10)
    step = replace(step, memory=replace(step.memory, expected_temporaries_bytes=5 * GIB))
    cost = estimate(step, hardware(), config, nodes=2, headroom=0.0)
    assert cost.wire_ratio == pytest.approx(1.6)
    assert cost.memory_ratio == pytest.approx(0.8)


def test_it_fits_with_what_is_unseen_and_the_headroom() -> None:
    memory = program().memory
    assert fit(memory, hardware(), 0.2).fits  # 7 + 1 + 2 of 10
    assert not fit(memory, hardware(), 0.2001).fits
    assert not fit(replace(memory, peak_bytes=7 * GIB + 1), hardware(), 0.2).fits
    assert fit(memory, hardware(unseen_memory_bytes={}), 0.3).fits


def test_the_budget_is_steps_or_tokens_or_unknown(config: RunConfig) -> None:
    assert total_steps(config) == tiny.STEPS
    tokens = override(config, ["train.steps=null", f"data.mixture.tokens={tiny.BATCH_SIZE * tiny.LENGTH * 7 + 5}"])
    assert total_steps(tokens) == 7
    unknown = override(config, ["train.steps=null", "data.mixture={groups: [{select: {}, epochs: 1.0}]}"])
    assert total_steps(unknown) is None
    cost = estimate(program(), hardware(), unknown, nodes=2, headroom=0.0, price=3.0)
    assert (cost.steps, cost.days, cost.dollars) == (None, None, None)


def test_days_and_dollars(config: RunConfig) -> None:
    priced = hardware(price={"dollars_per_device_hour": 2.0, "source": "a list"})
    cost = estimate(program(), priced, config, nodes=2, headroom=0.0)
    assert cost.days == pytest.approx(tiny.STEPS * 26 / 86400)
    assert cost.dollars == pytest.approx(tiny.STEPS * 26 / 3600 * 4 * 2.0)
    own = estimate(program(), priced, config, nodes=2, headroom=0.0, price=6.0)
    assert own.dollars == pytest.approx(3 * cost.dollars)
    assert estimate(program(), hardware(), config, nodes=2, headroom=0.0).dollars is None


def test_the_audit_names_every_bound_that_is_broken(config: RunConfig) -> None:
    good = estimate(program(), hardware(), config, nodes=2, headroom=0.0)
    assert good.flop_ratio > 1.03
    assert audit(program(), good, "dots") == []
    bad = replace(
        good,
        wire_ratio=1.011,
        hidden_share={"loop": 0.899, "edges": 0.0, "replica": 0.79},
        memory_ratio=1.11,
        flop_ratio=1.051,
    )
    broken = audit(program(violations=("a gather of float32 weights",)), bad, "dots")
    assert [line.split()[0] for line in broken] == [
        "wire_ratio",
        "hidden_share.loop",
        "hidden_share.replica",
        "memory_ratio",
        "flop_ratio",
        "a",
    ]
    assert "flop_ratio" not in " ".join(audit(program(), bad, "full"))
