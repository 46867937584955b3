import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlite_jax.config import ModelConfig
from tlite_jax.model import decoder
from tlite_jax.telemetry.throughput import Flops, Throughput, flops_per_token, num_parameters, peak_flops

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
SMOLLM2_135M = LLAMA_3_8B.model_copy(
    update={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
)


def test_llama_3_8b_takes_the_cards_flops():
    assert num_parameters(LLAMA_3_8B) == 8_030_261_248
    flops = flops_per_token(LLAMA_3_8B, 8192)
    assert round(flops.mfu / 1e9, 2) == 61.07
    assert round(flops.mfu_causal / 1e9, 2) == 51.47
    # T-lite's card: 3000 tokens a second on an A100 are an MFU of 0.59.
    assert round(3000 * flops.mfu / peak_flops("NVIDIA A100-SXM4-80GB"), 2) == 0.59


def test_smollm2_counts_its_tied_embedding_once_and_as_a_product():
    assert num_parameters(SMOLLM2_135M) == 134_515_008  # as its model card's safetensors
    no_attention = flops_per_token(SMOLLM2_135M, 0)
    norms = 61 * 576
    assert no_attention == (6 * 134_515_008, 6 * (134_515_008 - norms))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_those_of_the_decoder(tied, bias):
    model = SMOLLM2_135M.model_copy(
        update={"tie_word_embeddings": tied, "attention_bias": bias, "head_dim": 32, "num_hidden_layers": 3}
    )
    specs = jax.tree.leaves(decoder.param_specs(model), is_leaf=lambda x: hasattr(x, "axes"))
    assert num_parameters(model) == sum(math.prod(spec.shape) for spec in specs)


def test_attention_is_as_wide_as_heads_times_head_dim():
    wide = LLAMA_3_8B.model_copy(update={"head_dim": 256})
    for convention, factor in (("mfu", 12), ("mfu_causal", 6)):
        longer, shorter = (getattr(flops_per_token(wide, length), convention) for length in (101, 100))
        assert longer - shorter == factor * 32 * 32 * 256


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_peaks_of_devices_as_jax_names_them(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize(
    "kind",
    ["cpu", "Tesla V100-SXM2-32GB", "Tesla T4", "NVIDIA A10G", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "TPU v2", ""],
)
def test_unknown_peaks_are_none(kind):
    assert peak_flops(kind) is None


def test_the_devices_here_have_no_peak():
    assert peak_flops(jax.devices()[0].device_kind) is None


def meter(peak=312e12, num_devices=96):
    flops = flops_per_token(LLAMA_3_8B, 8192)
    return Throughput(flops, tokens_per_step=768 * 8192, num_devices=num_devices, peak_flops_per_device=peak)


def test_the_cards_run_in_numbers():
    throughput = meter()
    assert throughput.update(1, 1000.0) == {}  # the compiled step
    rates = throughput.update(11, 1000.0 + 10 * 768 * 8192 / (96 * 3000))
    assert rates["tokens_per_second"] == pytest.approx(96 * 3000)
    assert rates["step_seconds"] == pytest.approx(21.845, abs=1e-3)
    assert rates["mfu"] == pytest.approx(0.587, abs=5e-4)
    assert rates["mfu_causal"] == pytest.approx(0.495, abs=5e-4)


def test_without_a_peak_there_is_no_mfu():
    throughput = meter(peak=None)
    throughput.update(1, 0.0)
    assert set(throughput.update(2, 1.0)) == {"tokens_per_second", "step_seconds"}


def test_what_came_before_a_restart_is_not_counted():
    throughput = meter()
    throughput.update(1, 0.0)
    throughput.restart(5, 500.0)  # an evaluation after step 5 ended here
    assert throughput.update(7, 510.0)["step_seconds"] == 5.0


def test_times_that_stand_still_give_no_rate():
    throughput = meter()
    throughput.update(3, 10.0)
    assert throughput.update(4, 10.0) == {}
    assert throughput.update(4, 11.0) == {}


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(1e-3, 1e5))
def test_rates_do_not_depend_on_how_often_one_looks(first, steps, seconds):
    throughput = Throughput(Flops(1.0, 1.0), tokens_per_step=7, num_devices=3, peak_flops_per_device=2.0)
    throughput.update(first, 0.0)
    rates = throughput.update(first + steps, seconds)
    assert rates["tokens_per_second"] * seconds == pytest.approx(7 * steps)
    assert rates["mfu"] == pytest.approx(rates["tokens_per_second"] / 6)
