"""Hugging Face tokenizer files -> a GGUF file's `tokenizer.*` metadata, checked by what both make of the same texts.

Llama.cpp holds the rules by which text is split before merges apply, and a GGUF file only names them
(`tokenizer.ggml.pre`); a wrong name gives other token ids without an error. So the name is not guessed from the
model's: the tokenizer's own splitting is compared with that of every pre-tokenizer this module knows, and then the
ids of the tokenizer that `tokenizer_from_gguf` rebuilds from the metadata with the original's, on texts made to tell
them apart and on the text of every token.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlite_jax.bridge.files import parse_json, shown
from tlite_jax.bridge.tokenizer import (
    CONTROL,
    GENERATION,
    NORMAL,
    PIPELINES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    UNUSED,
    USER_DEFINED,
    load_tokenizer,
    padding_token,
    pre_tokenizer_of,
    tokenizer_from_gguf,
)
from tlite_jax.errors import UserError

_TEMPLATE, _SPECIAL_MAP = "chat_template.jinja", "special_tokens_map.json"
PROBES = (
    "",
    " ",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЛКА, объём: 12345 руб.",
    "The quick brown fox doesn't jump; it's we'll see. I'VE 'RE 'S we'D You'Ll can'T 'm 'x",
    "1 12 123 1234 12345 123456 1234567 3.14 2,718 1_000 ½ ² ① ٣٤٥ Ⅷ v2 x86 3d",
    "def f(x):\n    if x != 0:\n\t\treturn x**2  # комментарий\r\n\r\n\n\n   \n  end\t \n",
    "!!!\n\n??? ...\n---\r\n#$%^&*()[]{}<>/\\|`~'\"«»—…№\n",
    "😀👍🏽🇷🇺 ❤️ 👩‍👩‍👧‍👦 日本語 한국어 हिन्दी ไทย ä e\u0301 ﬁ Ａ İ ß",
    "  two   three    four\u00a0nbsp\u2003em\u200bzero\u3000wide \t tab  ",
    "a'b 'c' don’t O'Neil 'twas __init__ snake_case CamelCase kebab-case a/b\\c",
    " leading\n trailing \n",
)


def tokenizer_to_gguf(
    files: Mapping[str, bytes], vocab_size: int, origin: str, pre_tokenizer: str | None = None
) -> dict[str, Any]:
    """Makes the `tokenizer.*` metadata of a byte-level BPE tokenizer.

    Args:
      files: Hugging Face tokenizer files by name; at least tokenizer.json.
      vocab_size: rows of the model's embedding; ids that the tokenizer lacks become unused tokens.
      origin: names the files in errors.
      pre_tokenizer: llama.cpp's name of the pre-tokenizer; taken as given, unchecked. None: recognised.

    Raises:
      UserError: no tokenizer.json, or one that GGUF, llama.cpp or this module cannot express; the line says what.
    """
    if TOKENIZER not in files:
        raise UserError(f"{origin}: no tokenizer.json; a GGUF file needs the tokenizer, put its files there")
    content = parse_json(files[TOKENIZER], f"{origin}/{TOKENIZER}")
    original = load_tokenizer(files[TOKENIZER], origin)
    original.no_truncation()
    original.no_padding()
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError(f"{origin}: not a byte-level BPE tokenizer; GGUF export knows no other")
    pre = pre_tokenizer or _recognised(original, origin)
    settings = parse_json(files.get(TOKENIZER_CONFIG, b"{}"), f"{origin}/{TOKENIZER_CONFIG}")
    tokens, types = _tokens(original, vocab_size, origin)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if merges := [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]:
        metadata["tokenizer.ggml.merges"] = merges
    metadata |= _special_ids(original, files, settings, origin)
    metadata |= _chat_templates(files, settings)
    if pre_tokenizer is None:
        _compare(original, metadata, origin)
    return metadata


def _recognised(original: Any, origin: str) -> str:
    """The pre-tokenizer that splits every probe as the original does, and byte for byte."""
    splitter = original.pre_tokenizer
    for pre in PIPELINES:
        ours = pre_tokenizer_of(pre)
        if splitter is not None and all(_pieces(splitter, text) == _pieces(ours, text) for text in PROBES):
            return pre
    raise UserError(
        f"{origin}: the tokenizer splits text as none of {', '.join(PIPELINES)} does; "
        "if llama.cpp knows its pre-tokenizer, name it with --pre-tokenizer (unchecked)"
    )


def _pieces(splitter: Any, text: str) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(text)]


def _tokens(original: Any, vocab_size: int, origin: str) -> tuple[list[str], list[int]]:
    """Every id's token and its type."""
    by_id = {index: token for token, index in original.get_vocab(with_added_tokens=True).items()}
    if max(by_id, default=0) >= vocab_size:
        raise UserError(f"{origin}: the tokenizer's ids reach {max(by_id)}, the model's vocabulary has {vocab_size}")
    added = original.get_added_tokens_decoder()
    tokens = [by_id.get(index, padding_token(index)) for index in range(vocab_size)]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{origin}: the tokenizer has tokens named [PADn], which stand for unused ids in GGUF")
    types = []
    for index in range(vocab_size):
        if index not in by_id:
            types.append(UNUSED)
        elif index in added:
            types.append(CONTROL if added[index].special else USER_DEFINED)
        else:
            types.append(NORMAL)
    return tokens, types


def _special_ids(original: Any, files: Mapping[str, bytes], settings: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Ids of the named tokens, and whether the tokenizer puts BOS and EOS round a text."""
    named = {**parse_json(files.get(_SPECIAL_MAP, b"{}"), f"{origin}/{_SPECIAL_MAP}"), **settings}
    generation = parse_json(files.get(GENERATION, b"{}"), f"{origin}/{GENERATION}")
    ids = {name: _id_of(original, named.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
    ends = generation.get("eos_token_id")
    ends = [index for index in (ends if isinstance(ends, list) else [ends]) if type(index) is int]
    if ids["bos"] is None and type(generation.get("bos_token_id")) is int:
        ids["bos"] = generation["bos_token_id"]
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    before, after = _frame(original)
    if before not in ([], [ids["bos"]]) or after not in ([], [ids["eos"]]):
        raise UserError(
            f"{origin}: the tokenizer puts {before} before and {after} after a text; GGUF knows BOS and EOS"
        )
    result = {
        f"tokenizer.ggml.{key}_token_id": ids[name]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if ids[name] is not None
    }
    others = [index for index in ends if index != ids["eos"]]
    for index in others:
        key = "eom" if original.id_to_token(index) == "<|eom_id|>" else "eot"
        result.setdefault(f"tokenizer.ggml.{key}_token_id", index)
    return result | {
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def _id_of(original: Any, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json writes it: its text, or an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return original.token_to_id(text) if isinstance(text, str) else None


def _frame(original: Any) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    bare, framed = original.encode("a", add_special_tokens=False).ids, original.encode("a").ids
    begin = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
    return framed[:begin], framed[begin + len(bare) :]


def _chat_templates(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, Any]:
    template = settings.get("chat_template")
    named: dict[str, str] = {}
    if isinstance(template, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, dict)]
        named = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    elif isinstance(template, str):
        named["default"] = template
    if _TEMPLATE in files:
        named["default"] = files[_TEMPLATE].decode("utf-8", errors="replace")
    result: dict[str, Any] = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        result["tokenizer.chat_templates"] = sorted(named)
    return result | {f"tokenizer.chat_template.{name}": named[name] for name in sorted(named)}


def _compare(original: Any, metadata: Mapping[str, Any], origin: str) -> None:
    """Raises UserError where the tokenizer that the metadata describes gives other ids than the original."""
    rebuilt = load_tokenizer(tokenizer_from_gguf(metadata, origin)[TOKENIZER], origin)
    tokens = metadata["tokenizer.ggml.tokens"]
    unused = {index for index, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == UNUSED}
    texts = [*PROBES, *_texts_of(original, [index for index in range(len(tokens)) if index not in unused])]
    added = [token.content for token in original.get_added_tokens_decoder().values()]
    texts += [f"a {token} b{token}{token}\n{token}1" for token in added]
    if differing := _first_difference(original, rebuilt, texts):
        raise UserError(
            f"{origin}: GGUF cannot say all that tokenizer.json does: {shown(json.dumps(differing))} gets other ids; "
            "if llama.cpp knows its pre-tokenizer, name it with --pre-tokenizer (unchecked)"
        )


def _texts_of(original: Any, ids: Iterable[int]) -> Sequence[str]:
    """What each token stands for, where that is valid text."""
    texts = original.decode_batch([[index] for index in ids], skip_special_tokens=False)
    return [text for text in texts if "\ufffd" not in text]


def _first_difference(original: Any, rebuilt: Any, texts: Sequence[str]) -> str | None:
    for special in (True, False):
        pairs = zip(
            texts,
            original.encode_batch(texts, add_special_tokens=special),
            rebuilt.encode_batch(texts, add_special_tokens=special),
            strict=True,
        )
        for text, theirs, ours in pairs:
            if theirs.ids != ours.ids:
                return text or "an empty text"
    return None
