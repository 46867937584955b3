"""config.json in both spellings; refusals by name."""

from typing import Any

import pytest
from transformers import LlamaConfig

from tlite_jax.bridge.hf_config import hf_config, model_config_from_hf
from tlite_jax.config import Llama3RopeScaling
from tlite_jax.errors import UserError

# as published for Llama-3-8B and Llama-3.1-8B, in transformers 4's spelling
LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {**SCALING, "rope_type": "llama3"},
}


def test_reads_llama3_as_published() -> None:
    model = model_config_from_hf(LLAMA3)
    assert (model.head_dim, model.num_key_value_heads, model.vocab_size) == (128, 8, 128256)
    assert (model.rope_theta, model.rope_scaling, model.rms_norm_eps) == (500000.0, None, 1e-5)
    assert not model.tie_word_embeddings


def test_reads_llama31_in_both_spellings_and_the_older_type_key() -> None:
    new = {key: value for key, value in LLAMA31.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {**SCALING, "rope_type": "llama3", "rope_theta": 500000.0}, "dtype": "bfloat16"}
    old = LLAMA31 | {"rope_scaling": {**SCALING, "type": "llama3"}}
    model = model_config_from_hf(LLAMA31)
    assert model.rope_scaling == Llama3RopeScaling(**SCALING)
    assert model_config_from_hf(new) == model_config_from_hf(old) == model


def test_fields_left_out_have_the_values_that_transformers_gives_them() -> None:
    required = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {key: LLAMA3[key] for key in (*required, "num_attention_heads")}
    model, theirs = model_config_from_hf(config), LlamaConfig(**config)
    for field in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "attention_bias"):
        assert getattr(model, field) == getattr(theirs, field), field
    assert (model.tie_word_embeddings, model.initializer_range) == (False, theirs.initializer_range)
    assert model.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("config", [LLAMA3, LLAMA31, LLAMA31 | {"head_dim": 64, "attention_bias": True}])
def test_written_config_reads_back_and_transformers_agrees(config: dict[str, Any]) -> None:
    model = model_config_from_hf(config)
    written = hf_config(model, "bfloat16", {"bos_token_id": 5, "eos_token_id": [6, 7]})
    assert model_config_from_hf(written) == model
    theirs = LlamaConfig.from_dict(written)
    assert model_config_from_hf(theirs.to_dict()) == model
    assert (theirs.bos_token_id, theirs.eos_token_id, str(theirs.dtype)) == (5, [6, 7], "torch.bfloat16")


def test_written_config_has_transformers_4_spelling() -> None:
    written = hf_config(model_config_from_hf(LLAMA31), "float16", {})
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == {**SCALING, "rope_type": "llama3"}
    assert written["torch_dtype"] == "float16"
    assert hf_config(model_config_from_hf(LLAMA3), "float16", {})["rope_scaling"] is None


MISTRAL = {**LLAMA3, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = {
    **LLAMA3,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": False,
    "max_window_layers": 28,
    "sliding_window": 4096,
}
GEMMA2 = {
    **LLAMA3,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_act": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MISTRAL, ["mistral is not supported", "model_type", "MistralForCausalLM", "sliding_window"]),
        (QWEN2, ["qwen2 is not supported", "Qwen2ForCausalLM", "sliding_window: 4096", "max_window_layers"]),
        (GEMMA2, ["gemma2 is not supported", "hidden_act: 'gelu_pytorch_tanh'", "final_logit_softcapping: 30.0"]),
        (LLAMA3 | {"mlp_bias": True}, ["mlp_bias: True (Llama: False)"]),
        (LLAMA3 | {"hidden_act": "gelu"}, ["hidden_act: 'gelu'"]),
        (LLAMA3 | {"pretraining_tp": 2}, ["pretraining_tp: 2"]),
        (LLAMA3 | {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        (LLAMA3 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor: 0.5"]),
        (LLAMA3 | {"attention_dropout": 0.1}, ["attention_dropout: 0.1"]),
        (LLAMA3 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.rope_type 'linear'"]),
        (LLAMA3 | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_parameters.rope_type 'yarn'"]),
        (LLAMA3 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["lacks low_freq_factor"]),
        (LLAMA3 | {"rope_scaling": {**SCALING, "rope_type": "llama3", "beta_fast": 3}}, ["rope_scaling.beta_fast"]),
        (LLAMA3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ["given twice", "10000.0"]),
        (LLAMA31 | {"rope_parameters": {"rope_type": "default"}}, ["RoPE scaling is given twice"]),
        ({k: v for k, v in LLAMA3.items() if k != "model_type"}, ["model_type: absent"]),
        ({k: v for k, v in LLAMA3.items() if k != "hidden_size"}, ["missing: hidden_size"]),
        (LLAMA3 | {"num_key_value_heads": 5}, ["num_attention_heads (32) must be a multiple"]),
        (LLAMA3 | {"num_attention_heads": 30}, ["hidden_size 4096 is not a multiple"]),
        (LLAMA3 | {"hidden_size": "4096", "head_dim": 128}, ["hidden_size", "integer"]),
        (LLAMA3 | {"rms_norm_eps": 0.0}, ["rms_norm_eps"]),
    ],
)
def test_refuses_by_name(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        model_config_from_hf(config, "x/config.json")
    assert "\n" not in str(error.value)
    for word in ["x/config.json", *words]:
        assert word in str(error.value)
