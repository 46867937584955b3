"""Tokenizer files: carried over from a Hugging Face directory, or built from a GGUF file's metadata."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlite_jax.bridge.files import contained, parse_json
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CARRIED = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", GENERATION)
_SLOW = ("tokenizer.model", "vocab.json", "merges.txt")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# GGUF's token types (llama.cpp: llama_token_type)
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def read_tokenizer(directory: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the tokenizer files of a Hugging Face directory, by name, in a form transformers 4 and 5 load alike.

    tokenizer.json is taken as it is; a directory that has only the older files is converted by transformers. The
    class becomes PreTrainedTokenizerFast, which uses tokenizer.json as written (others rebuild parts of it, and
    transformers 5 rebuilds more than 4). generation_config.json comes along, or is made from the config's token ids.

    Args:
      directory: holds the files.
      config: the model's config.json.

    Returns:
      Files by name; without tokenizer.json when the directory has no tokenizer.

    Raises:
      UserError: a file that is a link out of the directory, is not JSON, or cannot be converted.
    """
    files = {
        name: contained(directory, name, str(directory)).read_bytes() for name in CARRIED if (directory / name).exists()
    }
    if TOKENIZER not in files and any((directory / name).is_file() for name in _SLOW):
        files |= _converted(directory)
    if TOKENIZER in files:
        settings = parse_json(files.get(TOKENIZER_CONFIG, b"{}"), f"{directory / TOKENIZER_CONFIG}")
        files[TOKENIZER_CONFIG] = _dump(portable_settings(settings))
        parse_json(files[TOKENIZER], f"{directory / TOKENIZER}")
    if GENERATION not in files:
        ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
        files[GENERATION] = _dump({"_from_model_config": True, **ids})
    return files


def portable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 and 5 both load, using tokenizer.json as it is written."""
    dropped = ("auto_map", "backend", "is_local", "local_files_only", "tokenizer_file", "name_or_path")
    result = {name: value for name, value in settings.items() if name not in dropped}
    # transformers 5 writes a list where 4 wants a dictionary; both read the older name.
    if isinstance(result.get("extra_special_tokens"), list):
        result["additional_special_tokens"] = result.pop("extra_special_tokens")
    # Llama takes no token_type_ids, which transformers 4 adds unless told what the model takes.
    result.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return result | {"tokenizer_class": "PreTrainedTokenizerFast"}


def check_vocabulary(files: Mapping[str, bytes], model: ModelConfig, origin: str) -> None:
    """Raises UserError when tokenizer.json has an id that the model has no embedding for."""
    if TOKENIZER not in files:
        return
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_buffer(files[TOKENIZER]).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{origin}: tokenizer.json cannot be read: {str(error).splitlines()[0]}") from error
    largest = max(vocabulary.values(), default=-1)
    if largest >= model.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer's ids reach {largest}, the model's vocabulary has {model.vocab_size}; "
            "they belong to different models"
        )


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: str) -> dict[str, bytes]:
    """Builds Hugging Face tokenizer files from a GGUF file's `tokenizer.*` metadata.

    Byte-level BPE only, with the pre-tokenizers listed in this file; token ids equal the original tokenizer's.

    Raises:
      UserError: another tokenizer or pre-tokenizer, by name; contradictory metadata.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(
            f"{origin}: tokenizer {kind!r} is not supported, only byte-level BPE ('gpt2') is; import from HF"
        )
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{origin}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    tokens = _strings(metadata, "tokens", origin)
    merges = [_pair(merge, origin) for merge in _strings(metadata, "merges", origin)]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    _check_gguf(tokens, vocabulary, merges, types, origin)
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot"))
    }
    for name, index in ids.items():
        if index is not None and not (isinstance(index, int) and 0 <= index < len(tokens)):
            raise UserError(f"{origin}: {name} token id {index!r} is not one of {len(tokens)} tokens")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", _PRE_TOKENIZERS[pre] == "llama-bpe")
    bos = (tokens[ids["bos"]], ids["bos"]) if add_bos and ids["bos"] is not None else None
    special = {name: tokens[index] for name, index in ids.items() if index is not None and name != "eot"}
    settings = {f"{name}_token": token for name, token in special.items()}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        settings["chat_template"] = template
    if isinstance(length := metadata.get("llama.context_length"), int):
        settings["model_max_length"] = length
    settings["clean_up_tokenization_spaces"] = False
    return {
        TOKENIZER: _byte_level_bpe(_PRE_TOKENIZERS[pre], tokens, types, vocabulary, merges, bos, special.values()),
        TOKENIZER_CONFIG: _dump(portable_settings(settings)),
        GENERATION: _dump(_generation(ids)),
    }


def _generation(ids: Mapping[str, int | None]) -> dict[str, Any]:
    ends = [index for index in dict.fromkeys((ids["eos"], ids["eot"])) if index is not None]
    values = {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else ids["eos"]}
    values["pad_token_id"] = ids["pad"]
    return {"_from_model_config": True, **{name: value for name, value in values.items() if value is not None}}


def _byte_level_bpe(
    pre: str,
    tokens: Sequence[str],
    types: Sequence[int],
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    bos: tuple[str, int] | None,
    named: Any,
) -> bytes:
    """A tokenizer.json; the pipelines are those that the models' publishers ship."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    steps: list[Any] = [byte_level]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre == "llama-bpe":
        steps.insert(0, pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"))
    # llama-bpe: a piece that is a token is that token, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        template = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL or token in set(named)]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined if token not in special])
    return tokenizer.to_str(pretty=True).encode()


def _check_gguf(
    tokens: Sequence[str],
    vocabulary: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    types: Sequence[int],
    origin: str,
) -> None:
    if len(vocabulary) != len(tokens):
        raise UserError(f"{origin}: {len(tokens) - len(vocabulary)} tokens are listed twice; the file is damaged")
    if len(types) != len(tokens):
        raise UserError(f"{origin}: {len(tokens)} tokens and {len(types)} token types; the file is damaged")
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary.keys():
            raise UserError(f"{origin}: merge {' '.join(merge)!r} has parts that are not tokens; the file is damaged")


def _pair(merge: str, origin: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise UserError(f"{origin}: merge {merge!r} is not of two tokens; the file is damaged")
    return left, right


def _strings(metadata: Mapping[str, Any], name: str, origin: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{origin}: tokenizer.ggml.{name} is absent or not a list of strings")
    return values


def _converted(directory: Path) -> dict[str, bytes]:
    """Lets transformers turn older tokenizer files into tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json form")
    except Exception as error:  # many kinds, by tokenizer
        line = str(error).strip().splitlines()[0:1] or [type(error).__name__]
        raise UserError(f"{directory}: no tokenizer.json, and converting its tokenizer failed: {line[0]}") from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: (Path(folder) / name).read_bytes() for name in CARRIED if (Path(folder) / name).is_file()}


def _dump(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
