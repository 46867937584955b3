"""A compiled step and a machine with round numbers, to price and to report."""

from dataclasses import replace
from typing import Any

from tlite_jax.plan.program import Collective, Memory, Program, Work
from tlite_jax.plan.topology import Hardware

GIB = 2**30


def hardware(**changes: Any) -> Hardware:
    """Two devices a node; 100 FLOP/s of products, 10 bytes/s of memory, 4 of link, 2 of NIC, 10 GiB."""
    rates = {
        "matmul": 100.0,
        "attention_forward": 50.0,
        "attention_backward": 25.0,
        "memory": 10.0,
        "intra_node": 4.0,
        "inter_node": 2.0,
    }
    values = {
        "title": "a machine",
        "kind": "cpu",
        "devices_per_node": 2,
        "memory_bytes": 10 * GIB,
        "peak_flops": {"value": 200.0, "source": "a datasheet"},
        "rates": {name: {"value": rate, "source": f"source of {name}"} for name, rate in rates.items()},
        "unseen_memory_bytes": {"context": GIB},
    }
    return Hardware(**{**values, **changes})


def collective(**changes: Any) -> Collective:
    """An asynchronous gather inside a node that takes 2 seconds, and spans products of 1 second."""
    values = {
        "name": "all-gather.1",
        "kind": "all-gather",
        "dtype": "bf16",
        "where": "loop",
        "group_size": 2,
        "group_nodes": 1,
        "groups_per_node": 1,
        "count": 1,
        "buffer_bytes": 16,
        "wire_bytes": 8,
        "overlapped_flops": 100.0,
        "is_async": True,
    }
    return Collective(**{**values, **changes})


def program(*collectives: Collective, **changes: Any) -> Program:
    """A step of 10 s of products, 2 + 10 s of attention, 3 s elementwise and 1 s of optimizer, on two nodes of two."""
    memory = Memory(
        arguments_bytes=3 * GIB,
        temporaries_bytes=4 * GIB,
        peak_bytes=7 * GIB,
        parameters_bytes=GIB,
        optimizer_bytes=2 * GIB,
        gradients_bytes=GIB,
        expected_temporaries_bytes=4 * GIB,
    )
    work = Work(
        matmul_flops=1000.0,
        attention_flops=350.0,
        needed_flops=1300.0,
        matmul_bytes=10.0,
        elementwise_bytes=30.0,
        optimizer_bytes=10.0,
        attention_bytes=1.0,
    )
    step = Program(
        num_devices=4,
        num_nodes=2,
        num_microbatches=2,
        tokens_per_device=64,
        compile_seconds=1.0,
        memory=memory,
        work=work,
        collectives=collectives,
        minimum_wire_bytes=sum(each.count * each.wire_bytes for each in collectives),
    )
    return replace(step, **changes)
