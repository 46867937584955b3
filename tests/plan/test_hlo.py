"""Reading HLO text: groups, loops, products, and collectives in the forms that GPUs and TPUs give them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from tlite_jax.config import ExecutionConfig
from tlite_jax.plan.audit import Intent, collectives
from tlite_jax.plan.hlo import Array, Module, replica_groups
from tlite_jax.plan.work import Executed, Kernels

ACROSS = [[0, 4], [1, 5], [2, 6], [3, 7]]
NEIGHBOURS = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "text",
    [
        "{{0,4},{1,5},{2,6},{3,7}}, use_global",
        "[4,2]<=[2,4]T(1,0), use_global",
        "[4,2]<=[2,2,2]T(1,2,0)",
        "mesh['replica'=2,'fsdp'=4] {'replica'}, use_global",
        "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1','axis_2'}, use_global",
    ],
)
def test_replica_groups_are_read_in_every_form(text):
    assert sorted(sorted(row) for row in replica_groups(text).tolist()) == ACROSS


@pytest.mark.parametrize(
    "text", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8], channel", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}"]
)
def test_groups_of_neighbours_are_read_in_every_form(text):
    assert sorted(sorted(row) for row in replica_groups(text).tolist()) == NEIGHBOURS


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="in a form not known"):
        replica_groups("somehow")
    with pytest.raises(ValueError, match="no entry computation"):
        Module("HloModule nothing")


@pytest.mark.parametrize(("dtype", "num_bytes"), [("f32", 24), ("bf16", 12), ("f8e4m3fn", 6), ("pred", 6), ("s4", 3)])
def test_arrays_know_their_bytes(dtype, num_bytes):
    assert Array(dtype, (2, 3)).num_bytes == num_bytes


def test_flops_of_real_programs_count_loops():
    """5 x 2 of [8, 16] x [16, 16] in nested loops, and one of [8, 16] x [16, 4]; XLA counts a loop's body once."""

    def program(x, weights, last):
        def outer(x, _):
            return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0] @ last

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (2, 16, 16), (16, 4))]
    module = Module(jax.jit(program).lower(*shapes).compile().as_text())
    assert module.computation_flops(module.entry) == 5 * 2 * (2 * 8 * 16 * 16) + 2 * 8 * 16 * 4


TPU_PRODUCT = """HloModule m

ENTRY %main (a: bf16[8,64,1], b: bf16[32,16,64]) -> bf16[8,32,16] {
  %a = bf16[8,64,1]{1,0,2} parameter(0)
  %b = bf16[32,16,64]{2,1,0} parameter(1)
  ROOT %c = bf16[8,32,16]{2,1,0} convolution(%a, %b), window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
}
"""


def test_a_tpus_product_in_the_form_of_a_padded_convolution_is_no_more_than_the_product():
    module = Module(TPU_PRODUCT)
    assert module.computation_flops(module.entry) == 2 * 8 * 64 * 32 * 16


@pytest.mark.parametrize(
    ("window", "taps"),
    [
        ("size=3", 3 * 6),
        ("size=3 pad=1_1", 3 * 8 - 2),
        ("size=3 stride=2 pad=1_0", 3 * 4 - 1),
        ("size=2 lhs_dilate=2", 14),
    ],
)
def test_taps_that_meet_padding_or_holes_do_not_count(window, taps):
    """One feature in, one out; numpy's count of pairs by hand for 8 inputs."""
    outputs = {"size=3": 6, "size=3 pad=1_1": 8, "size=3 stride=2 pad=1_0": 4, "size=2 lhs_dilate=2": 14}[window]
    text = f"""HloModule m

ENTRY %main (a: f32[1,8,1], b: f32[3,1,1]) -> f32[1,{outputs},1] {{
  %a = f32[1,8,1]{{2,1,0}} parameter(0)
  %b = f32[3,1,1]{{2,1,0}} parameter(1)
  ROOT %c = f32[1,{outputs},1]{{2,1,0}} convolution(%a, %b), window={{{window}}}, dim_labels=b0f_0io->b0f
}}
"""
    module = Module(text)
    assert module.computation_flops(module.entry) == pytest.approx(2 * taps)


TPU_COLLECTIVES = """HloModule m

%all-reduce-scatter.1 (p: f32[64,4096]) -> f32[16,4096] {
  %p = f32[64,4096]{1,0} parameter(0)
  %r = f32[64,4096]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[16,4096]{1,0} slice(%r), slice={[0:16], [0:4096]}
}

%start (q: bf16[16,4096]) -> (bf16[16,4096], bf16[64,4096]) {
  %q = bf16[16,4096]{1,0} parameter(0)
  %g = bf16[64,4096]{1,0} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = (bf16[16,4096]{1,0}, bf16[64,4096]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%carried (q: bf16[16,4096], x: bf16[128,64], w: bf16[64,32]) -> bf16[128,32] {
  %q = bf16[16,4096]{1,0} parameter(0)
  %x = bf16[128,64]{1,0} parameter(1)
  %w = bf16[64,32]{1,0} parameter(2)
  %g = bf16[64,4096]{1,0} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %d = bf16[128,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%done (q: bf16[16,4096]) -> bf16[64,4096] {
  %q = bf16[16,4096]{1,0} parameter(0)
  %g = bf16[64,4096]{1,0} all-gather(%q), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %t = bf16[64,4096]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (q: bf16[16,4096], x: bf16[128,64], w: bf16[64,32], p: f32[64,4096]) -> bf16[64,4096] {
  %q = bf16[16,4096]{1,0} parameter(0)
  %x = bf16[128,64]{1,0} parameter(1)
  %w = bf16[64,32]{1,0} parameter(2)
  %p = f32[64,4096]{1,0} parameter(3)
  %f.1 = (bf16[16,4096]{1,0}, bf16[64,4096]{1,0}) fusion(%q), kind=kCustom, calls=%start
  %f.2 = bf16[128,32]{1,0} fusion(%q, %x, %w), kind=kOutput, calls=%carried
  %f.3 = f32[16,4096]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %f.4 = bf16[64,4096]{1,0} fusion(%q), kind=kCustom, calls=%done
}
"""


def test_a_tpus_fused_collectives_count_once_and_hide_behind_what_carries_them():
    intent = Intent(tiny_model(), ExecutionConfig(), num_replicas=2, num_shards=4)
    module = Module(TPU_COLLECTIVES)
    found, _ = collectives(module, intent, module.flops, devices_per_node=4)
    gather, scatter = found
    assert (gather.kind, gather.is_async, gather.overlapped_flops) == ("all-gather", True, 2 * 128 * 64 * 32)
    assert (gather.buffer_bytes, gather.wire_bytes) == (64 * 4096 * 2, 64 * 4096 * 2 * 3 // 4)
    assert (scatter.kind, scatter.is_async) == ("reduce-scatter", False)
    assert scatter.wire_bytes == 64 * 4096 * 4 * 3 // 4


SPARSECORE_COLLECTIVES = """HloModule m

%gathering (p: bf16[16,4096]) -> bf16[64,4096] {
  %p = bf16[16,4096]{1,0} parameter(0)
  ROOT %g = bf16[64,4096]{1,0} all-gather(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

%scattering (p: f32[64,4096]) -> f32[16,4096] {
  %p = f32[64,4096]{1,0} parameter(0)
  ROOT %r = f32[16,4096]{1,0} reduce-scatter(%p), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (q: bf16[16,4096], x: bf16[128,64], w: bf16[64,32], p: f32[64,4096]) -> bf16[64,4096] {
  %q = bf16[16,4096]{1,0} parameter(0)
  %x = bf16[128,64]{1,0} parameter(1)
  %w = bf16[64,32]{1,0} parameter(2)
  %p = f32[64,4096]{1,0} parameter(3)
  %c.1 = ((bf16[16,4096]), bf16[64,4096]) call-start(%q), async_execution_thread="sparsecore", to_apply=%gathering
  %c.2 = ((), f32[16,4096]{1,0}) call-start(), async_execution_thread="sparsecore", to_apply=%scattering
  %u.2 = ((f32[64,4096]{1,0}), f32[16,4096]{1,0}) call-update(%c.2, %p)
  %d.1 = bf16[128,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %e.2 = f32[16,4096]{1,0} call-done(%u.2)
  %d.2 = bf16[128,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %e.1 = bf16[64,4096]{1,0} call-done(%c.1)
}
"""


def test_collectives_that_sparsecores_carry_hide_behind_what_runs_until_they_are_done():
    intent = Intent(tiny_model(), ExecutionConfig(), num_replicas=2, num_shards=4)
    module = Module(SPARSECORE_COLLECTIVES)
    gather, scatter = collectives(module, intent, module.flops, devices_per_node=4)[0]
    product = 2 * 128 * 64 * 32
    assert (gather.kind, gather.is_async, gather.overlapped_flops) == ("all-gather", True, 2 * product)
    assert (scatter.kind, scatter.is_async, scatter.overlapped_flops) == ("reduce-scatter", True, product)
    assert (gather.wire_bytes, scatter.wire_bytes) == (64 * 4096 * 2 * 3 // 4, 64 * 4096 * 4 * 3 // 4)
    moved = Executed(module, Kernels(0, 0, 1)).work(tiny_model(), needed_flops=0, shard_bytes=0)
    assert moved.elementwise_bytes == 0


def test_traffic_counts_slices_and_updates_in_place_as_what_they_move():
    """A loop that reads a row of a large array and writes one of another: rows, not arrays."""

    def program(source):
        def body(target, row):
            return jax.lax.dynamic_update_index_in_dim(target, jnp.sin(source[row]), row, 0), None

        return jax.lax.scan(body, jnp.zeros_like(source), jnp.arange(64))[0]

    shape = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
    module = Module(jax.jit(program).lower(shape).compile().as_text())
    work = Executed(module, Kernels(0, 0, 1)).work(tiny_model(), needed_flops=0, shard_bytes=0)
    array = 64 * 1024 * 4
    assert 2 * array <= work.elementwise_bytes <= 5 * array
    assert work.matmul_flops == np.float64(0)


def test_traffic_counts_a_slice_fetched_ahead_as_the_slice():
    """As libtpu fetches parts of an array into vector memory; the whole array is in the result's type."""
    text = (
        "HloModule m\n\nENTRY %main (q: s8[4096]) -> s8[64] {\n  %q = s8[4096]{0} parameter(0)\n"
        "  %s = ((s8[4096]{0}), s8[64]{0:S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:64]}\n"
        "  ROOT %d = s8[64]{0:S(1)} slice-done(%s)\n}\n"
    )
    work = Executed(Module(text), Kernels(0, 0, 1)).work(tiny_model(), needed_flops=0, shard_bytes=0)
    assert work.elementwise_bytes == 2 * 64


@pytest.mark.parametrize(
    ("line", "forward", "backward"),
    [
        ('%a.1 = (bf16[8]{0}) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"', 1, 0),
        ('%a.1 = (bf16[8]{0}) custom-call(%q), custom_call_target="__cudnn$fmhaSoftmaxBackward"', 0, 1),
        ('%splash_mha_fwd_residuals.2 = (bf16[8]{0}) custom-call(%q), custom_call_target="tpu_custom_call"', 1, 0),
        ('%splash_mha_dkv_no_residuals.2 = (bf16[8]{0}) custom-call(%q), custom_call_target="tpu_custom_call"', 0, 1),
        (
            '%c = (bf16[8]{0}) custom-call(%q), custom_call_target="__gpu$xla.gpu.triton", '
            'metadata={op_name="jit(step)/transpose(jvp())/mha/pallas_call"}',
            0,
            1,
        ),
        ('%c = (bf16[8]{0}) custom-call(%q), custom_call_target="cub$DeviceRadixSort"', 0, 0),
    ],
)
def test_attention_kernels_are_told_apart(line, forward, backward):
    text = (
        f"HloModule m\n\nENTRY %main (q: bf16[8]) -> bf16[8] {{\n  %q = bf16[8]{{0}} parameter(0)\n  ROOT {line}\n}}\n"
    )
    module = Module(text)
    kernels = Kernels(forward=1.0, backward=100.0, num_backward=2)
    flops = Executed(module, kernels).work(tiny_model(), needed_flops=0, shard_bytes=0).attention_flops
    assert flops == forward + 50 * backward
