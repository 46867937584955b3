"""Hugging Face's config.json <-> ModelConfig, in the spellings of transformers 4 and 5; all but Llama is refused."""

from collections.abc import Mapping
from typing import Any

from tlite_jax.config import Llama3RopeScaling, ModelConfig
from tlite_jax.config_files import parse
from tlite_jax.errors import UserError

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# what transformers' LlamaConfig assumes when a config.json leaves a field out
_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "initializer_range": 0.02,
}
_DEFAULT_THETA = 10000.0
# field -> the values under which a model is still a plain Llama
_PLAIN: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (None, [], ["LlamaForCausalLM"]),
    "hidden_act": (None, "silu", "swish"),
    "mlp_bias": (None, False),
    "pretraining_tp": (None, 0, 1),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "attention_dropout": (None, 0),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None, 0),
    "vision_config": (None,),
    "text_config": (None,),
}
# fields whose mere presence marks another architecture
_FOREIGN = ("sliding_window", "use_sliding_window", "layer_types", "query_pre_attn_scalar", "max_window_layers")
_SCALING = tuple(Llama3RopeScaling.model_fields)
_ABSENT = object()


def model_config_from_hf(config: Mapping[str, Any], origin: str = "config.json") -> ModelConfig:
    """Reads the content of a config.json, as transformers 4 or 5 writes it.

    Raises:
      UserError: another architecture, naming it and the fields that differ from Llama's; a field missing or
        contradictory.
    """
    _refuse_other_architectures(config, origin)
    if missing := [name for name in _REQUIRED if config.get(name) is None]:
        raise UserError(f"{origin}: missing: {', '.join(missing)}")
    theta, scaling = _rope(config, origin)
    values = {name: config[name] for name in _REQUIRED}
    values |= {name: _given(config, name, default) for name, default in _DEFAULTS.items()}
    values["rope_theta"], values["rope_scaling"] = theta, scaling
    values["num_key_value_heads"] = _given(config, "num_key_value_heads", config["num_attention_heads"])
    values["head_dim"] = config.get("head_dim")
    if values["head_dim"] is None:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        if type(hidden) is not int or type(heads) is not int or heads < 1 or hidden % heads:
            raise UserError(f"{origin}: hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}")
        values["head_dim"] = hidden // heads
    return parse(ModelConfig, values, origin)


def hf_config(model: ModelConfig, weights_dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json that transformers 4 and 5 load.

    Args:
      model: the shape.
      weights_dtype: name of the dtype to load the weights in.
      token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known.
    """
    plain = model.model_dump(mode="json", exclude={"rope_theta", "rope_scaling"})
    scaling = None if model.rope_scaling is None else model.rope_scaling.model_dump(mode="json")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **plain,
        **{name: token_ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "use_cache": True,
        # transformers 4
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **scaling},
        "torch_dtype": weights_dtype,
        # transformers 5
        "rope_parameters": {
            "rope_type": "default" if scaling is None else "llama3",
            "rope_theta": model.rope_theta,
            **(scaling or {}),
        },
        "dtype": weights_dtype,
    }


def _refuse_other_architectures(config: Mapping[str, Any], origin: str) -> None:
    differing = [
        f"{name}: {_short(config[name])} (Llama: {_short(plain[-1])})"
        for name, plain in _PLAIN.items()
        if name in config and not any(_equal(config[name], value) for value in plain)
    ]
    if "model_type" not in config:
        differing.insert(0, "model_type: absent (Llama: 'llama')")
    if not differing:
        return
    if config.get("model_type") != "llama":
        named = " ".join(differing)
        differing += [
            f"{name}: {_short(config[name])} (Llama has none)"
            for name in _FOREIGN
            if name in config and f"{name}:" not in named
        ]
    kind = config.get("model_type")
    architecture = kind if isinstance(kind, str) and kind != "llama" else "this variant of Llama"
    raise UserError(f"{origin}: {architecture} is not supported; fields that differ: {'; '.join(differing)}")


def _rope(config: Mapping[str, Any], origin: str) -> tuple[Any, dict[str, Any] | None]:
    """Returns (theta, scaling) from rope_theta and rope_scaling (4.x) and rope_parameters (5.x), which must agree."""
    thetas, scalings = [], []
    if config.get("rope_theta") is not None:
        thetas.append(config["rope_theta"])
    for field in ("rope_scaling", "rope_parameters"):
        if field not in config or (field == "rope_parameters" and config[field] is None):
            continue
        theta, scaling = _rope_field(config, field, origin)
        scalings.append(scaling)
        if theta is not None:
            thetas.append(theta)
    for name, found in (("rope_theta", thetas), ("RoPE scaling", scalings)):
        if any(value != found[0] for value in found[1:]):
            shown = " and ".join(_short(value) for value in found)
            raise UserError(f"{origin}: {name} is given twice, differently: {shown}; keep the true one")
    return (thetas or [_DEFAULT_THETA])[0], (scalings or [None])[0]


def _rope_field(config: Mapping[str, Any], field: str, origin: str) -> tuple[Any, dict[str, Any] | None]:
    values = config[field]
    if values is None:
        return None, None
    if not isinstance(values, dict):
        raise UserError(f"{origin}: {field} must be an object or null")
    kind = values.get("rope_type", values.get("type"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{origin}: {field}.rope_type {kind!r} is not supported; supported: default, llama3")
    wanted = _SCALING if kind == "llama3" else ()
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *wanted}
    foreign = sorted(name for name in values.keys() - allowed if values[name] is not None)
    if kind == "default":
        foreign = [name for name in foreign if name not in _SCALING]  # transformers ignores them too
    if foreign or not _equal(values.get("partial_rotary_factor", 1), 1):
        shown = [f"{field}.{name}" for name in foreign or ["partial_rotary_factor"]]
        raise UserError(f"{origin}: {', '.join(shown)}: not supported in a Llama model; remove it if it has no effect")
    # transformers 5 reads this one field from either place
    outer = {name: config[name] for name in wanted[-1:] if name in config}
    scaling = {**outer, **{name: values[name] for name in wanted if name in values}}
    if missing := [name for name in wanted if scaling.get(name) is None]:
        raise UserError(f"{origin}: {field} lacks {', '.join(missing)}")
    return values.get("rope_theta"), scaling or None


def _given(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    return default if value is None else value


def _equal(value: Any, plain: Any) -> bool:
    if isinstance(value, bool) != isinstance(plain, bool):
        return False
    return bool(value == plain)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
