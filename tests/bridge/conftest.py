"""Tiny models and a tokenizer on disk, as transformers saves them, and as tests spoil them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.bridge.fuzzing import made_gguf, made_hf
from tests.bridge.tiny import tiny_model, train_tokenizer


@pytest.fixture
def save_tiny(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., tuple[Path, LlamaForCausalLM]]:
    """Saves a tiny model with its tokenizer as transformers does; returns its directory and the model."""

    def save(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Path, LlamaForCausalLM]:
        directory = tmp_path / f"{name}-source"
        model = tiny_model(name, dtype)
        model.save_pretrained(directory, **options)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_dir).save_pretrained(directory)
        return directory, model

    return save


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer directory with a chat template."""
    directory = tmp_path_factory.mktemp("tokenizer")
    backend = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A directory as transformers has it."""
    return made_hf(tmp_path / "hf")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file."""
    return made_gguf(tmp_path / "gguf")
