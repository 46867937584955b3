"""SmolLM2-135M in transformers and in ours, for tests that need real weights; skipped where they are not."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers
from helpers import hf_model

from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.names import slots
from tlite_jax.config import MeshConfig
from tlite_jax.evaluate.language_model import LanguageModel
from tlite_jax.model.decoder import param_specs
from tlite_jax.sharding import make_mesh, place_params


class Both(NamedTuple):
    """The same weights twice."""

    ours: LanguageModel
    theirs: Any


def load(directory: Path, max_length: int) -> Both:
    """Reads the GGUF file that TLITE_SMOLLM2_GGUF names; `directory` is for the tokenizer's files."""
    path = os.environ.get("TLITE_SMOLLM2_GGUF")
    if not path:
        pytest.skip("set TLITE_SMOLLM2_GGUF to a GGUF file of SmolLM2-135M: make test-smollm2")
    imported = import_gguf(Path(path))
    for name, content in imported.tokenizer.items():
        (directory / name).write_bytes(content)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), imported.params)
    theirs = hf_model(imported.model)
    state = theirs.state_dict()
    for slot in slots(imported.model):
        group, _, leaf = slot.path.rpartition("/")
        array = params[group][leaf] if group else params[leaf]
        state[slot.hugging_face].copy_(torch.from_numpy(array if slot.layer is None else array[slot.layer]))
    theirs.generation_config.eos_token_id = tokenizer.eos_token_id
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    placed = place_params(params, param_specs(imported.model), mesh)
    return Both(LanguageModel(placed, imported.model, mesh, tokenizer, max_length=max_length), theirs)
