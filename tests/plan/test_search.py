"""Meshes that fit, what a search tries and ranks, what would make a run fit."""

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.plan.fakes import GIB, hardware, program
from tlite_jax.config import RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.errors import UserError
from tlite_jax.plan.cost import Cost, estimate
from tlite_jax.plan.program import Program
from tlite_jax.plan.search import (
    check_batch,
    check_mesh,
    default_nodes,
    first_fits,
    meshes,
    remedies,
    remedy_on,
    search,
)
from tlite_jax.plan.topology import Domain
from tlite_jax.plan.worker import Failure

CLUSTER = Domain(num_domains=4, devices_per_domain=2, nodes_per_domain=1, name="node")
SAVED_BY_REMAT = {"full": 1, "attention": 2, "dots": 3, "none": 7}


def config(*words: str) -> RunConfig:
    """The tests' run with 96 sequences in a batch, of which 8 devices can take 12 each."""
    run = parse(RunConfig, tiny.values(Path("nowhere"), Path("run")), "test")
    return override(run, ["train.batch_size=96", "execution.remat=dots", *words])


def price(step: Program, run: RunConfig) -> Cost:
    """On the fake machine of 10 GiB, one of which is unseen."""
    return estimate(step, hardware(), run, nodes=4, headroom=0.0)


CRASHED = Failure("crashed")


class Compiler:
    """Peak memory of 8 / fsdp GiB of state and some of each sequence; faster the less it recomputes."""

    def __init__(self, run: RunConfig, broken: str = "", failure: Failure = CRASHED):
        self.run, self.broken, self.failure = run, broken, failure
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, variants: Sequence[tuple[str, ...]]) -> Generator[Program | Failure, None, None]:
        for words in variants:
            self.asked.append(tuple(words))
            if self.broken and self.broken in words:
                yield self.failure
                continue
            changed = override(self.run, words)
            num_devices = changed.mesh.replica * (changed.mesh.fsdp or 8)
            microbatches = changed.execution.num_microbatches
            sequences = changed.train.batch_size // num_devices // microbatches
            kept = SAVED_BY_REMAT[changed.execution.remat] * sequences
            peak = round((8 / (changed.mesh.fsdp or 8) + kept) * GIB)
            step = program(num_devices=num_devices, num_microbatches=microbatches)
            flops = 1000.0 * (2 - kept / 10) + microbatches
            yield replace(
                step,
                memory=replace(step.memory, peak_bytes=peak),
                work=replace(step.work, matmul_flops=flops),
            )


def test_nodes_follow_the_mesh() -> None:
    assert default_nodes(config("mesh.replica=3", "mesh.fsdp=4"), hardware()) == 6
    with pytest.raises(UserError, match=r"mesh\.fsdp is null, all devices that there are: give --nodes"):
        default_nodes(config("mesh.replica=3"), hardware())
    with pytest.raises(
        UserError, match=r"3 x 3 is 9 devices, no whole number of nodes of 2; use .* on 4 nodes, or use"
    ):
        default_nodes(config("mesh.replica=3", "mesh.fsdp=3"), hardware())


def test_a_mesh_that_the_devices_do_not_make_up_is_refused() -> None:
    check_mesh(config("mesh.replica=3", "mesh.fsdp=4"), hardware(), 6)
    check_mesh(config("mesh.replica=3"), hardware(), 6)
    with pytest.raises(UserError) as refused:
        check_mesh(config("mesh.replica=3", "mesh.fsdp=4"), hardware(), 8)
    assert str(refused.value) == (
        "mesh: replica 3 x fsdp 4 = 12 devices, but 8 nodes of 2 are 16; use mesh.replica=16 mesh.fsdp=1 or "
        "mesh.replica=8 mesh.fsdp=2 or mesh.replica=4 mesh.fsdp=4 on 8 nodes"
    )
    with pytest.raises(UserError, match="mesh: replica 3, but 4 nodes of 2 are 8"):
        check_mesh(config("mesh.replica=3"), hardware(), 4)


def test_a_batch_is_refused_as_in_training() -> None:
    check_batch(config(), 8, 12)
    with pytest.raises(UserError, match=r"96 is not divisible by 10 devices x 2 microbatches .* use 80 or 100"):
        check_batch(config(), 10, 2)


def test_meshes_shard_within_a_node_over_more_and_over_all() -> None:
    assert meshes(96, Domain(12, 8, 1, "node")) == [(12, 8), (6, 16), (1, 96)]
    assert meshes(96, Domain(1, 96, 24, "slice")) == [(12, 8), (1, 96)]
    assert meshes(8, Domain(1, 8, 1, "node")) == [(1, 8)]


def test_a_search_ranks_what_fits_and_compiles_no_more_than_it_must() -> None:
    compiler = Compiler(config())
    found, failures = search(config(), CLUSTER, compiler, price)
    speeds = [each.cost.tokens_per_second_per_device for each in found]
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) > 3
    assert all(each.cost.fit.fits for each in found)
    assert not failures
    assert len(compiler.asked) == len(set(compiler.asked))
    assert not any("remat=offload" in word for words in compiler.asked for word in words)
    for each in found:
        assert each.sequences * each.program.num_microbatches * each.program.num_devices == 96
    # Of 9 GiB, one of eight shards takes 1: 7 for one sequence under none leave nothing for a second, 3 each under
    # dots do for two, and 2 each under attention for four. One of two shards takes 4.
    kept = {fsdp: [] for fsdp in (2, 4, 8)}
    for each in sorted(found, key=lambda each: each.sequences):
        kept[each.config.mesh.fsdp].append((each.sequences, each.config.execution.remat))
    assert kept[8] == [(1, "none"), (2, "dots"), (3, "attention"), (4, "attention")]
    assert kept[4] == [(1, "none"), (2, "dots"), (3, "attention"), (4, "full")]
    assert kept[2] == [(1, "dots"), (2, "attention"), (3, "full"), (4, "full")]
    assert len(compiler.asked) == 12 + 2 + 3 + 3


def test_what_does_not_compile_is_reported_and_what_runs_out_of_memory_is_not() -> None:
    found, failures = search(config(), CLUSTER, Compiler(config(), broken="execution.remat=none"), price)
    assert len(failures) == 3
    assert all(line.endswith(": crashed") and "execution.remat=none" in line for line in failures)
    assert {each.config.execution.remat for each in found} == {"dots", "attention", "full"}
    compiler = Compiler(config(), broken="execution.remat=none", failure=Failure("out", is_memory=True))
    again, failures = search(config(), CLUSTER, compiler, price)
    assert ([each.words for each in again], failures) == ([each.words for each in found], [])


def test_a_number_of_sequences_that_does_not_divide_closes_no_way() -> None:
    compiler = Compiler(config("train.batch_size=24"))
    found, _ = search(config("train.batch_size=24"), CLUSTER, compiler, price)
    assert {each.sequences for each in found} == {1, 3}  # 24 over 8 devices is 3 each, which 2 does not divide


def test_remedies_change_one_thing_and_then_several() -> None:
    tried = remedies(config("mesh.replica=4", "mesh.fsdp=2", "execution.num_microbatches=4"), 8, sequences=3)
    smaller, full, shards = (
        ("execution.num_microbatches=12",),
        ("execution.remat=full",),
        ("mesh.replica=1", "mesh.fsdp=8"),
    )
    assert tried[:4] == [smaller, ("execution.remat=attention",), full, shards]
    assert tried[-1] == (*smaller, *full, *shards)
    assert len(tried) == len(set(tried))
    lean = config("mesh.replica=1", "mesh.fsdp=8", "execution.num_microbatches=12", "execution.remat=full")
    assert remedies(lean, 8, sequences=1) == []


def test_what_fits_is_found_by_compiling_no_more_than_needed() -> None:
    run = config("mesh.replica=4", "mesh.fsdp=2", "execution.num_microbatches=4", "execution.remat=none")
    compiler = Compiler(run)
    variants = remedies(run, 8, sequences=3)
    found = first_fits(run, variants, compiler, price, most=1)
    assert [each.words for each in found] == [("execution.remat=full",)]
    assert found[0].cost.fit.fits
    assert len(compiler.asked) == variants.index(("execution.remat=full",)) + 1
    assert first_fits(run, [("execution.num_microbatches=4",)], compiler, price, most=1) == []


def test_on_more_devices_the_leanest_variant_keeps_the_batch_if_it_can() -> None:
    run = config()
    lean = override(run, remedy_on(run, 32))
    assert (lean.train.batch_size, lean.execution.num_microbatches, lean.mesh.fsdp) == (96, 3, 32)
    assert (lean.execution.remat, lean.mesh.replica) == ("full", 1)
    enlarged = override(run, remedy_on(run, 64))
    assert (enlarged.train.batch_size, enlarged.execution.num_microbatches) == (128, 2)
