"""Token ids: the checkpoint's tokenizer, Transformers over the HF export, GGUF metadata, and llama.cpp agree."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.gguf_tokenizer import PROBES
from tlite_jax.bridge.tokenizer import TOKENIZER, load_tokenizer, read_files, tokenizer_from_gguf
from tlite_jax.errors import UserError
from tlite_jax.release.files import Exports
from tlite_jax.release.sample import LANGUAGES, documents

Encode = Callable[[str], list[int]]
_MOST_SPECIAL = 24


def encoders(tokenizer_dir: Path, exports: Exports, llama_cpp: Any) -> dict[str, Encode]:
    """Name -> text to ids, special tokens added; the first is the checkpoint's.

    Args:
      tokenizer_dir: of the run.
      exports: what is released.
      llama_cpp: the module, or None where it is not installed.

    Raises:
      UserError: a tokenizer is missing or cannot be read.
    """
    ours = load_tokenizer(_tokenizer_file(read_files(tokenizer_dir), str(tokenizer_dir)), str(tokenizer_dir))
    result: dict[str, Encode] = {"checkpoint": partial(_ids, ours)}
    if exports.hf is not None:
        from transformers import AutoTokenizer

        _tokenizer_file(read_files(exports.hf), str(exports.hf))
        theirs = AutoTokenizer.from_pretrained(exports.hf, local_files_only=True, trust_remote_code=False)
        result["transformers"] = lambda text: list(theirs(text)["input_ids"])
    for file in exports.ggufs.values():
        metadata, _ = gguf_file.read(file)
        rebuilt = load_tokenizer(tokenizer_from_gguf(metadata, str(file))[TOKENIZER], str(file))
        result[file.name] = partial(_ids, rebuilt)
    if llama_cpp is not None and exports.ggufs:
        file = next(iter(exports.ggufs.values()))
        loaded = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        result[f"llama.cpp over {file.name}"] = lambda text: list(
            loaded.tokenize(text.encode(), add_bos=True, special=True)
        )
    return result


def cases(tokenizer_dir: Path) -> list[str]:
    """Russian, English, code, emoji, white space, and text around special tokens."""
    tokenizer = load_tokenizer((tokenizer_dir / TOKENIZER).read_bytes(), str(tokenizer_dir))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:_MOST_SPECIAL]
    texts = [text for language in LANGUAGES for text in documents(language)]
    return [*PROBES, *texts, *(f"да{token}нет {token}\n{token}{token} 1" for token in special)]


def differences(found: Mapping[str, Encode], texts: list[str]) -> tuple[int, list[str]]:
    """How many ids were compared, and the first text on which each encoder differs from the first one."""
    (_, reference), *others = found.items()
    expected = [reference(text) for text in texts]
    wrong = []
    for name, encode in others:
        for text, ids in zip(texts, expected, strict=True):
            if (theirs := encode(text)) != ids:
                wrong.append(f"{name} makes {theirs[:8]} of {text[:40]!r}, the checkpoint's tokenizer {ids[:8]}")
                break
    return sum(map(len, expected)), wrong


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


def _tokenizer_file(files: Mapping[str, bytes], origin: str) -> bytes:
    if TOKENIZER not in files:
        raise UserError(f"{origin} has no {TOKENIZER}")
    return files[TOKENIZER]
