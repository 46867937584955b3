"""Tokenizer files: carried over from a Hugging Face directory, or built from a GGUF file's metadata."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlite_jax.bridge.files import MAX_JSON_BYTES, contained, parse_json, read_bounded, shown
from tlite_jax.config import ModelConfig
from tlite_jax.errors import UserError

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CARRIED = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", GENERATION)
_SLOW = ("tokenizer.model", "vocab.json", "merges.txt")
_BESIDE_SLOW = ("config.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_MAX_SETTINGS_BYTES = 16 << 20
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# GGUF's token types (llama.cpp: llama_token_type)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# our name of a token -> its key tokenizer.ggml.KEY_token_id; the first four are settings of Hugging Face too
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
_SETTINGS = ("bos", "eos", "unk", "pad")
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# pre-tokenizers that tokenizers' pipelines reproduce, under llama.cpp's names
PIPELINES = ("llama-bpe", "smollm", "gpt-2")
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
    files = _present(directory, CARRIED)
    if TOKENIZER not in files and (slow := _present(directory, _SLOW)):
        files |= _converted(slow | _present(directory, _BESIDE_SLOW), directory)
    if TOKENIZER in files:
        settings = parse_json(files.get(TOKENIZER_CONFIG, b"{}"), f"{directory / TOKENIZER_CONFIG}")
        files[TOKENIZER_CONFIG] = _dump(portable_settings(settings))
        parse_json(files[TOKENIZER], f"{directory / TOKENIZER}")
    if GENERATION not in files:
        ids = {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
        files[GENERATION] = _dump({"_from_model_config": True, **ids})
    return files


def _present(directory: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files of these names that are there; links out of the directory and very large ones are refused."""
    return {
        name: read_bounded(
            contained(directory, name, str(directory)),
            MAX_JSON_BYTES if name in (TOKENIZER, *_SLOW) else _MAX_SETTINGS_BYTES,
        )
        for name in names
        if (directory / name).exists()
    }


def read_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer files of a run, which are ours, by name; none when the directory is absent."""
    return {name: (directory / name).read_bytes() for name in CARRIED if (directory / name).is_file()}


def portable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 and 5 both load, using tokenizer.json as it is written."""
    dropped = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path")
    # "tokenizer_file", "vocab_file" and their like are paths, of the machine that wrote them or of a stranger's choice.
    result = {name: value for name, value in settings.items() if name not in dropped and not name.endswith("_file")}
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
    vocabulary = load_tokenizer(files[TOKENIZER], origin).get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if largest >= model.vocab_size:
        raise UserError(
            f"{origin}: the tokenizer's ids reach {largest}, the model's vocabulary has {model.vocab_size}; "
            "they belong to different models"
        )


def load_tokenizer(content: bytes, origin: str) -> Any:
    """A tokenizers.Tokenizer from the bytes of a tokenizer.json.

    Raises:
      UserError: it is not one.
    """
    import tokenizers

    with _in_one_line(f"{origin}: tokenizer.json cannot be read"):
        return tokenizers.Tokenizer.from_buffer(content)


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turns whatever `tokenizers` raises into a UserError: bare Exceptions, and a panic, which is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        line = shown(([*str(error).strip().splitlines(), ""])[0] or type(error).__name__)
        raise UserError(f"{what}: {line}") from error


def padding_token(index: int) -> str:
    """The name under which llama.cpp's converter lists an id that the tokenizer lacks."""
    return f"[PAD{index}]"


def pre_tokenizer_of(pre: str) -> Any:
    """The pre-tokenizer of `tokenizers` that splits as llama.cpp's of this name, one of PIPELINES."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if pre == "llama-bpe":
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"), byte_level])
    return byte_level


def tokenizer_from_gguf(metadata: Mapping[str, Any], origin: str) -> dict[str, bytes]:
    """Builds Hugging Face tokenizer files from a GGUF file's `tokenizer.*` metadata.

    Byte-level BPE only, with the pre-tokenizers listed in this file; token ids equal the original tokenizer's.

    Raises:
      UserError: another tokenizer or pre-tokenizer, by name; contradictory metadata.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise UserError(
            f"{origin}: tokenizer {shown(repr(kind))} is not supported, only byte-level BPE ('gpt2') is; import from HF"
        )
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{origin}: pre-tokenizer {shown(repr(pre))} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens, types, merges = _vocabulary(metadata, origin)
    ids = _named_ids(metadata, len(tokens), origin)
    frame = []
    for name, by_default in (("bos", _PRE_TOKENIZERS[pre] == "llama-bpe"), ("eos", False)):
        index = ids[name] if metadata.get(f"tokenizer.ggml.add_{name}_token", by_default) else None
        frame.append(None if index is None else (tokens[index], index))
    special = {name: tokens[index] for name, index in ids.items() if index is not None and name in _SETTINGS}
    settings: dict[str, Any] = {f"{name}_token": token for name, token in special.items()}
    settings |= _chat_templates(metadata)
    if type(length := metadata.get("llama.context_length")) is int:
        settings["model_max_length"] = length
    settings["clean_up_tokenization_spaces"] = False
    named = set(special.values())
    types = [CONTROL if token in named else kind for token, kind in zip(tokens, types, strict=True)]
    with _in_one_line(f"{origin}: its tokens and merges make no tokenizer"):
        content = _byte_level_bpe(_PRE_TOKENIZERS[pre], tokens, types, merges, *frame)
    return {
        TOKENIZER: content,
        TOKENIZER_CONFIG: _dump(portable_settings(settings)),
        GENERATION: _dump(_generation(ids)),
    }


def _vocabulary(metadata: Mapping[str, Any], origin: str) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens, their types and the merges, agreeing with one another."""
    tokens = _strings(metadata, "tokens", origin)
    merges = []
    if "tokenizer.ggml.merges" in metadata:
        merges = [_pair(merge, origin) for merge in _strings(metadata, "merges", origin)]
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or not all(type(kind) is int for kind in types):
        raise UserError(f"{origin}: tokenizer.ggml.token_type is not a list of whole numbers")
    _check_gguf(tokens, merges, types, origin)
    return tokens, types, merges


def _named_ids(metadata: Mapping[str, Any], num_tokens: int, origin: str) -> dict[str, int | None]:
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    for name, index in ids.items():
        if index is not None and not (type(index) is int and 0 <= index < num_tokens):
            raise UserError(f"{origin}: {name} token id {shown(repr(index))} is not one of {num_tokens} tokens")
    return ids


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json's chat_template: a text, or a list when there are several."""
    template, names = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.chat_templates")
    named = {"default": template}
    if isinstance(names, list):
        named |= {name: metadata.get(f"tokenizer.chat_template.{name}") for name in names if isinstance(name, str)}
    named = {name: text for name, text in named.items() if isinstance(text, str)}
    if named.keys() <= {"default"}:
        return {"chat_template": named["default"]} if named else {}
    return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}


def _generation(ids: Mapping[str, int | None]) -> dict[str, Any]:
    ends = [index for index in dict.fromkeys((ids["eos"], ids["eot"], ids["eom"])) if index is not None]
    values = {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else ids["eos"]}
    values["pad_token_id"] = ids["pad"]
    return {"_from_model_config": True, **{name: value for name, value in values.items() if value is not None}}


def _byte_level_bpe(
    pre: str,
    tokens: Sequence[str],
    types: Sequence[int],
    merges: list[tuple[str, str]],
    bos: tuple[str, int] | None,
    eos: tuple[str, int] | None,
) -> bytes:
    """A tokenizer.json; the pipelines are those that the models' publishers ship."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    unused = {padding_token(index) for index, kind in enumerate(types) if kind == UNUSED}
    vocabulary = {token: index for index, token in enumerate(tokens) if token not in unused}
    # llama-bpe: a piece that is a token is that token, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizer_of(pre)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos or eos:
        ends = [token for token in (bos, eos) if token is not None]
        first = [*([f"{bos[0]}"] if bos else []), "$A", *([f"{eos[0]}"] if eos else [])]
        second = [part.replace("$A", "$B") + ":1" for part in first]
        template = processors.TemplateProcessing(single=first, pair=[*first, *second], special_tokens=ends)
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])
    return tokenizer.to_str(pretty=True).encode()


def _check_gguf(tokens: Sequence[str], merges: Sequence[tuple[str, str]], types: Sequence[int], origin: str) -> None:
    vocabulary = set(tokens)
    if len(vocabulary) != len(tokens):
        raise UserError(f"{origin}: {len(tokens) - len(vocabulary)} tokens are listed twice; the file is damaged")
    if len(types) != len(tokens):
        raise UserError(f"{origin}: {len(tokens)} tokens and {len(types)} token types; the file is damaged")
    for merge in merges:
        if not {*merge, "".join(merge)} <= vocabulary:
            raise UserError(
                f"{origin}: merge {shown(' '.join(merge))!r} has parts that are not tokens; the file is damaged"
            )


def _pair(merge: str, origin: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise UserError(f"{origin}: merge {shown(merge)!r} is not of two tokens; the file is damaged")
    return left, right


def _strings(metadata: Mapping[str, Any], name: str, origin: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{origin}: tokenizer.ggml.{name} is absent or not a list of strings")
    return values


def _converted(files: Mapping[str, bytes], directory: Path) -> dict[str, bytes]:
    """Lets transformers make tokenizer.json of copies of older tokenizer files, whose settings name no paths."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "source", Path(folder) / "result"
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
        if TOKENIZER_CONFIG in files:
            settings = parse_json(files[TOKENIZER_CONFIG], str(directory / TOKENIZER_CONFIG))
            kept = {name: value for name, value in settings.items() if not name.endswith("_file")}
            (source / TOKENIZER_CONFIG).write_bytes(_dump(kept))
        with _in_one_line(f"{directory}: no tokenizer.json, and converting its tokenizer failed"):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            if not tokenizer.is_fast:
                raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json form")
            tokenizer.save_pretrained(result)
        return {name: (result / name).read_bytes() for name in CARRIED if (result / name).is_file()}


def _dump(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
