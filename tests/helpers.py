"""Tiny models, the same ones in transformers, and batches; shared by the tests of the model, the step and decoding."""

from typing import Any

import jax
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlite_jax.config import Llama3RopeScaling, ModelConfig
from tlite_jax.sharding import map_specs

# With head_dim 16 and theta 1000 its bands hold 2 unchanged, 2 blended and 4 slowed frequencies.
ROPE_SCALING = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
)

_jit = jax.jit  # tests put quick_jit in its place
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}

_HF_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "output_bias": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}


def unpad_params(params: Any, specs: Any) -> Any:
    """Stored -> logical shapes."""
    return map_specs(lambda spec, param: param[tuple(slice(size) for size in spec.shape)], specs, params)


def tiny_model(**changes) -> ModelConfig:
    """A model of two layers whose settings are no library's defaults."""
    values = {
        "vocab_size": 131,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 3e-3,
        "rope_theta": 1000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    return ModelConfig(**{**values, **changes})


def hf_model(config: ModelConfig, seed: int = 0) -> LlamaForCausalLM:
    """Transformers' model of that shape, float32, eager attention; norms and biases are random too."""
    scaling = config.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling.model_dump()}
    shared = config.model_dump(exclude={"rope_theta", "rope_scaling"})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **shared,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.float().eval()


def params_from_hf(model: LlamaForCausalLM, config: ModelConfig) -> dict:
    """Our nested dict of float32 numpy arrays, copied weight by weight."""
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    layers = range(config.num_hidden_layers)
    blocks = {
        ours: np.stack([state[f"model.layers.{layer}.{theirs}"] for layer in layers])
        for ours, theirs in _HF_NAMES.items()
        if f"model.layers.0.{theirs}" in state
    }
    params = {
        "embedding": state["model.embed_tokens.weight"],
        "final_norm": state["model.norm.weight"],
        "blocks": blocks,
    }
    return params if config.tie_word_embeddings else {**params, "head": state["lm_head.weight"]}


def random_batch(config: ModelConfig, *, rows: int, length: int, seed: int = 0, documents: bool = False) -> dict:
    """Tokens, their successors as targets with some unscored, and segment ids of about three documents a row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = -1
    # Rows differ in how much of them is scored, so that a mean of means is not the mean.
    for row in range(rows):
        targets[row, length - (row * 5) % (length // 2) :] = -1
    batch = {"tokens": tokens, "targets": targets}
    if documents:
        starts = rng.random((rows, length)) < 3 / length
        starts[:, 0] = True
        batch["segment_ids"] = np.cumsum(starts, axis=1, dtype=np.int32)
    return batch


def max_difference(tree, other) -> float:
    """The largest absolute difference over two equally shaped nested dicts."""
    differences = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))), tree, other
    )
    return max(jax.tree.leaves(differences))


def quick_jit(function, **options):
    """jax.jit with little code generation, where tiny models spend their time; the partitioned program is the same."""
    return _jit(function, compiler_options=QUICK, **options)
