"""A byte-level tokenizer trained on the written sentences, and configs of runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from written_texts import ENGLISH, RUSSIAN

from tlite_jax.config import RunConfig
from tlite_jax.config_files import parse


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer directory with bos and eos, and settings that must not leak into what we write."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*RUSSIAN, *ENGLISH], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    return directory


@pytest.fixture
def run_config(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., RunConfig]:
    """Builds a run's config from sources and changes to `data`, `data.prepare` and the mixture."""

    def build(
        sources: Sequence[dict[str, Any]],
        *,
        prepare: dict[str, Any] | None = None,
        mixture: dict[str, Any] | None = None,
        vocab_size: int = 600,
        **data: Any,
    ) -> RunConfig:
        model = {
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
        held_out = {"fraction": 0.05}
        values = {
            "output": str(tmp_path / "run"),
            "model": model,
            "data": {
                "buckets": str(tmp_path / "buckets"),
                "tokenizer": str(tokenizer_dir),
                "sequence_length": 64,
                "prepare": {"sources": list(sources), "held_out": held_out, "num_workers": 1, **(prepare or {})},
                "mixture": mixture or {},
                **data,
            },
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.0},
            "schedule": {"name": "constant_with_warmup", "warmup_steps": 0},
            "train": {"batch_size": 8, "steps": 10},
        }
        return parse(RunConfig, values, "test")

    return build
