"""Small real models and tokenizers, made by the libraries that the bridge must agree with."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю. В 1917 году было 12345 рублей и 67 копеек.",
    "Пожалуйста, проверьте, что объём подъезда соответствует требованиям ГОСТ Р 51303-2013.",
    "The quick brown fox doesn't jump; it's we'll see 3.14159 and 2,718 'quoted' WORDS.",
    "def main(argv: list[str]) -> int:\n    if not argv:\n\t\treturn 0x1F  # комментарий\n    x += 10 ** 6\n\n\n",
    "Emoji: 😀👍🏽🇷🇺 ❤️ family 👩‍👩‍👧‍👦; naïve café Ångström ½ ² ١٢٣ 日本語 한국어   trailing   ",
    " 12345 12345 67890 123 123 45 45 1 2 3.5\n\n\n",
    "  \n \t leading; <|end|> in the middle <|start|>",
)
SPECIAL = ("<|end|>", "<|start|>", "<|pad|>")

CONFIGS: dict[str, dict[str, Any]] = {
    "tied_gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True},
    "scaled_bias": {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "hidden_size": 96,
        "attention_bias": True,
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12345.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "plain": {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 3e-4},
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random Llama with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(7)
    values = {
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | CONFIGS[name])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are made as ones, biases as zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def train_tokenizer(pre_tokenizer: Any, vocab_size: int = 600) -> Tokenizer:
    """A byte-level BPE tokenizer with three special tokens first, as SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
