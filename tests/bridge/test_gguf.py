"""GGUF import: weights, configs, damage."""

import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.bridge.gguf_writing import Kind, write_gguf
from tests.bridge.tiny import CONFIGS, tiny_model, train_tokenizer
from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.gguf import import_gguf, rope_factors
from tlite_jax.bridge.hf import export_hf
from tlite_jax.bridge.hf_config import model_config_from_hf
from tlite_jax.config import Llama3RopeScaling
from tlite_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))


def flat(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters under Hugging Face names, by hand."""
    names = {
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "query": "self_attn.q_proj.weight",
        "key": "self_attn.k_proj.weight",
        "value": "self_attn.v_proj.weight",
        "output": "self_attn.o_proj.weight",
        "query_bias": "self_attn.q_proj.bias",
        "key_bias": "self_attn.k_proj.bias",
        "value_bias": "self_attn.v_proj.bias",
        "output_bias": "self_attn.o_proj.bias",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }
    result = {
        f"model.layers.{layer}.{names[leaf]}": stacked[layer]
        for leaf, stacked in params["blocks"].items()
        for layer in range(len(stacked))
    }
    tops = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    return result | {tops[name]: array for name, array in params.items() if name in tops}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_1, Kind.Q8_0, Kind.Q5_0])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_what_gguf_undoes(tmp_path: Path, tokenizer: Tokenizer, name: str, kind: Kind) -> None:
    model = tiny_model(name)
    extra = {}
    if name == "scaled_bias":
        model.config.rope_parameters["rope_theta"] = 500000.0
        inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
        plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
        extra = {"rope_freqs.weight": (plain / inverse.numpy()).astype(np.float32)}
    undone = write_gguf(tmp_path / "x.gguf", model, kind, tokenizer, extra=extra)
    imported = import_gguf(tmp_path / "x.gguf")
    expected = model_config_from_hf(model.config.to_dict())
    # a GGUF does not say how the weights were initialised
    assert imported.model == expected.model_copy(update={"initializer_range": 0.02})
    ours = flat(jax.tree.map(np.asarray, imported.params))
    assert ours.keys() == undone.keys()
    for key, array in undone.items():
        assert np.array_equal(ours[key].astype(np.float32), array), key
    stored = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind)
    assert imported.params["blocks"]["query"].dtype.name == (stored or "float32")
    assert imported.weights_dtype == (stored or "bfloat16")
    assert bool(imported.notes) is (stored is None)


def test_k_quants_are_undone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    raw = {}
    for kind in (Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS):
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw[kind] = random.integers(0, 256, (3, 2 * block_bytes), dtype=np.uint8)
        writer.add_tensor(kind.name, raw[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, stored = gguf_file.read(tmp_path / "x.gguf")
    for kind, blocks in raw.items():
        assert (stored[kind.name].dtype, stored[kind.name].shape) == (kind.name, (3, 512))
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(stored[kind.name].read(), gguf.dequantize(blocks, kind))


def test_metadata_is_what_the_library_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.gguf"
    extra = {"a.array": [1.5, 2.5], "a.bool": True, "a.negative": [-3, 4], "a.flags": [True, False], "ключ": "знач"}
    write_gguf(path, tiny_model("plain"), Kind.Q8_0, tokenizer, extra=extra)
    metadata, stored = gguf_file.read(path)
    reader = gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert metadata == theirs
    assert list(stored) == [tensor.name for tensor in reader.tensors]


def test_transformers_computes_the_same_from_the_gguf_and_from_our_export(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model("tied_gqa")
    write_gguf(tmp_path / "x.gguf", model, Kind.F32, tokenizer)
    imported = import_gguf(tmp_path / "x.gguf")
    (tmp_path / "tokenizer").mkdir()
    for name, content in imported.tokenizer.items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    export_hf(imported.params, imported.model, tmp_path / "hf", tmp_path / "tokenizer", "float32")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([text("Съешь же ещё этих булок, 12345!")["input_ids"]])
    assert text.decode(ids[0]) == "Съешь же ещё этих булок, 12345!"
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)
    assert (ours.generation_config.bos_token_id, ours.generation_config.eos_token_id) == (1, 0)


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_llama31_scaling_is_recognised_by_its_factors(factor: float, theta: float, head_dim: int) -> None:
    factors = rope_factors(factor, 1.0, 4.0, 8192, head_dim, theta)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    assert np.all(factors[wavelengths < 8192 / 4] == 1)
    assert np.all(factors[wavelengths > 8192] == factor)
    if factor == 8.0:  # of Llama 3.1's 64 frequencies
        assert [int(np.sum(factors == 1)), int(np.sum(factors == 8))] == [29, 29]


def test_scaling_in_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model("plain")
    # at theta 500 no wavelength is long enough for any scaling; at 3000 none shows the whole factor
    write_gguf(
        tmp_path / "x.gguf",
        model,
        Kind.F32,
        tokenizer,
        extra={"rope_freqs.weight": rope_factors(32.0, 1.0, 4.0, 8192, 16, 500.0)},
    )
    assert import_gguf(tmp_path / "x.gguf").model.rope_scaling is None
    model.config.rope_parameters["rope_theta"] = 500000.0
    for factor, expected in ((8.0, 8.0), (1.0, None)):
        factors = rope_factors(factor, 1.0, 4.0, 8192, 16, 500000.0)
        write_gguf(tmp_path / "x.gguf", model, Kind.F32, tokenizer, extra={"rope_freqs.weight": factors})
        scaling = import_gguf(tmp_path / "x.gguf").model.rope_scaling
        assert scaling == (
            expected
            and Llama3RopeScaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
            )
        )
    blended = rope_factors(8.0, 1.0, 4.0, 8192, 16, 3000.0)
    for factors in (
        blended,
        rope_factors(8.0, 1.0, 4.0, 4096, 16, 500000.0),
        np.ones(7, np.float32),
        np.full(8, np.nan, "f4"),
    ):
        write_gguf(tmp_path / "x.gguf", model, Kind.F32, tokenizer, extra={"rope_freqs.weight": factors})
        with pytest.raises(UserError, match=r"rope_freqs.weight is not Llama 3's scaling"):
            import_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported, only 'llama' is"),
        ({"extra": {"llama.expert_count": 8}}, "fields that differ: llama.expert_count: 8"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "fields that differ: llama.rope.scaling.type: 'yarn'"),
        ({"extra": {"llama.attention.head_count": [4, 4, 2]}}, "head_count is [4, 4, 2]"),
        ({"extra": {"llama.attention.head_count_kv": [4, 4, 2]}}, "num_key_value_heads"),
        ({"extra": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8, heads have 16 dims"),
        ({"extra": {"llama.attention.value_length": 8}}, "llama.attention.value_length is 8"),
        ({"extra": {"llama.block_count": 0}}, "num_hidden_layers"),
        ({"extra": {"llama.attention.head_count": 0}}, "head_count is 0"),
        ({"extra": {"split.count": 3}}, "llama-gguf-split --merge"),
        ({"skip": ("llama.embedding_length", "llama.context_length")}, "llama.embedding_length, llama.context_length"),
        ({"skip": ("model.embed_tokens.weight",)}, "token_embd.weight is missing"),
        ({"skip": ("model.layers.1.mlp.up_proj.weight",)}, "missing: blk.1.ffn_up.weight"),
        ({"extra": {"blk.0.attn_q.scale": np.ones(3, np.float32)}}, "extra: blk.0.attn_q.scale"),
        ({"extra": {"llama.feed_forward_length": 192}}, "blk.0.ffn_gate.weight is [160, 64] instead of [192, 64]"),
        ({"extra": {"tokenizer.ggml.model": "llama"}}, "tokenizer 'llama' is not supported"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' is not supported; supported: gpt-2, smollm, llama-bpe"),
    ],
)
def test_refuses_by_name(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], words: str) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny_model("plain"), Kind.F16, tokenizer, **options)
    with pytest.raises(UserError) as error:
        import_gguf(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def head(num_tensors: int = 0, num_fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4" + bytes(100), "not a GGUF file"),
        (head(version=1), "version 1 is not supported"),
        (head(version=3 << 24), "version 50331648 is not supported"),
        (head(num_fields=1 << 60), "it announces 1152921504606846976 items"),
        (head(num_tensors=1 << 63), "it announces 9223372036854775808 tensors; more than 100000 are refused"),
        (head(num_fields=2), "its header leaves the file"),
        (head(num_fields=1) + struct.pack("<Q", 1 << 62) + bytes(50), "its header leaves the file"),
        (head(num_fields=1) + text(b"k") + struct.pack("<I", 77), "value type 77 is not known"),
        (head(num_fields=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 50), "it announces 1125899906842624 items"),
        (head(num_fields=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), "arrays of type 9 are not known"),
        (head(num_fields=1) + text(b"\xff\xfe") + bytes(20), "is not UTF-8"),
        (head(num_fields=2) + 2 * (text(b"k") + struct.pack("<IB", 0, 1)), "'k' is given twice"),
        (head(num_fields=1) + text(b"general.alignment") + struct.pack("<II", 4, 3), "alignment 3 is not a power"),
        (head(1) + tensor(b"t", [32], 0, 0), "tensor 't' leaves the file"),
        (head(1) + tensor(b"t", [1 << 62, 1 << 62], 0, 0), "has rows of 4611686018427387904 values"),
        (head(1) + tensor(b"t", [32], 0, 1 << 63), "tensor 't' leaves the file"),
        (head(1) + tensor(b"t", [32], 999, 0), "tensor 't' has type 999"),
        (head(1) + tensor(b"t", [33], 8, 0), "tensor 't' has rows of 33, not a multiple of 32"),
        (head(1) + tensor(b"t", [1] * 9, 0, 0), "tensor 't' has 9 dims"),
        (head(2) + tensor(b"t", [4], 0, 0) + tensor(b"t", [4], 0, 32) + bytes(99), "a tensor is listed twice"),
        (head(2) + tensor(b"t", [16], 0, 0) + tensor(b"u", [4], 0, 32) + bytes(99), "'t' and 'u' overlap"),
        (head(), "architecture None is not supported"),
    ],
)
def test_refuses_damaged_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        import_gguf(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sparse_giant_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head(num_fields=1) + text(b"k") + struct.pack("<IIQ", 9, 0, 1 << 39))
    os.truncate(path, 1 << 40)
    with pytest.raises(UserError, match="it announces 549755813888 items"):
        import_gguf(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> bytes:
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    write_gguf(path, tiny_model("tied_gqa"), Kind.Q8_0, tokenizer)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(
    data: st.DataObject, small_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(small_file)
    header_bytes = 20_000  # metadata, tokens and tensor entries
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header_bytes))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    refusal = ""
    try:
        model, params = (imported := import_gguf(path)).model, imported.params
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert refusal or params["embedding"].shape == (model.vocab_size, model.hidden_size)


@pytest.mark.skipif("TLITE_SMOLLM2_GGUF" not in os.environ, reason="TLITE_SMOLLM2_GGUF names no file")
def test_smollm2_speaks_english(tmp_path: Path) -> None:
    imported = import_gguf(Path(os.environ["TLITE_SMOLLM2_GGUF"]))
    (tmp_path / "tokenizer").mkdir()
    for name, content in imported.tokenizer.items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    export_hf(imported.params, imported.model, tmp_path / "hf", tmp_path / "tokenizer", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
