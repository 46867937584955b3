"""The training step of Hugging Face transformers and torch on a CPU, set up as well as its users would set it up.

The same work as ours: float32, forward with loss, backward, clipping by the global norm, decoupled AdamW. Settings
that were tried, in CPU seconds at the widths of SmolLM2-135M, 2 x 512 tokens, one thread: fused AdamW 0.17, foreach
0.74, a loop 0.62; a step of four layers with `sdpa` attention 2.5, with `eager` 2.7; a step of all layers 8.4, and 8.1
with glibc told to keep freed memory (not done here, since users do not). Losses agree with ours to 5e-7 over steps, on
tied and untied models, with biases and scaling.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tlite_jax.config import ModelConfig

Params = Mapping[str, Any]  # nested dict of float32 numpy arrays, layers stacked on the leading axis
Step = Callable[[np.ndarray], float]

_BLOCK_NAMES = {
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


def build(
    model: ModelConfig,
    params: Params,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
    threads: int,
    compile: bool,
) -> Step:
    """Makes the training step; sets the process's number of torch threads.

    Args:
      model: the shape.
      params: the weights to begin with; copied.
      learning_rate, betas, eps, weight_decay: of `torch.optim.AdamW`, so p <- p (1 - learning_rate * weight_decay).
      max_norm: of the gradients' global L2 norm.
      threads: within an operation.
      compile: wrap the model in `torch.compile`; needs a C++ compiler. The first call then takes minutes.

    Returns:
      tokens [B, T] int32 or int64 -> the mean loss in nats before the update; every token but a row's first is
      scored.
    """
    torch.set_num_threads(threads)
    llama = LlamaForCausalLM(_llama_config(model))
    llama.load_state_dict(_state_dict(model, params), strict=True)
    llama.train()
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )
    forward = torch.compile(llama, dynamic=False) if compile else llama

    def step(tokens: np.ndarray) -> float:
        ids_BT = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
        loss = forward(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def blas() -> str:
    """What multiplies torch's float32 matrices here: it differs between builds and processors."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"{torch.__version__}, BLAS {found.group(1) if found else 'unknown'}, " + (
        f"vectors {torch.backends.cpu.get_cpu_capability()}"
    )


def _llama_config(model: ModelConfig) -> LlamaConfig:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "dtype": "float32", "use_cache": False}
    fields = model.model_dump(exclude={"rope_theta", "rope_scaling"})
    return LlamaConfig(**fields, **settings, rope_parameters=rope)


def _state_dict(model: ModelConfig, params: Params) -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"]}
    state["lm_head.weight"] = params["embedding"] if model.tie_word_embeddings else params["head"]
    for name, stacked in params["blocks"].items():
        state |= {f"model.layers.{layer}.{_BLOCK_NAMES[name]}": stacked[layer] for layer in range(len(stacked))}
    return {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in state.items()}
