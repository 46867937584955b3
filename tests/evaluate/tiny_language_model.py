"""A random model with the tests' tokenizer, as a LanguageModel."""

import jax
import numpy as np
import transformers

from tests import tiny
from tlite_jax.config import MeshConfig, ModelConfig
from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.model.decoder import init_params, param_specs
from tlite_jax.sharding import make_mesh, place_params

MODEL = ModelConfig(**{**tiny.MODEL, "max_position_embeddings": 16})


def language_model(devices: int = 1, model: ModelConfig = MODEL) -> LanguageModel:
    """The same weights on any number of devices."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    params = jax.tree.map(np.asarray, init_params(model, seed=3))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.data() / "tokenizer")
    return LanguageModel(place_params(params, param_specs(model), mesh), model, mesh, tokenizer)
