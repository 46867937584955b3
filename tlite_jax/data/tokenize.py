"""Text -> tokens with a Hugging Face tokenizer and nothing it adds by itself: no special tokens, no truncation."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from tlite_jax.data.documents import BadDocument, Document
from tlite_jax.errors import UserError


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer as a value that travels to worker processes."""

    definition: str = field(repr=False)
    hash: str
    num_ids: int
    document_start: int | None
    document_end: int | None

    @property
    def pad_id(self) -> int:
        """What fills the last row of a bucket; never scored."""
        return self.document_end or 0


def load_tokenizer(directory: Path, document_start: str | None, document_end: str | None) -> TokenizerFile:
    """Reads a Hugging Face tokenizer directory and resolves the document boundaries to token ids.

    Args:
      directory: holds tokenizer.json, or files that transformers' AutoTokenizer converts without a network.
      document_start: "bos", "eos", a token's text, or None.
      document_end: the same.

    Raises:
      UserError: no tokenizer there, or it lacks a token asked for.
    """
    definition = _definition(directory)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{directory}: damaged tokenizer: {error}") from error
    return TokenizerFile(
        definition=definition,
        hash=hashlib.sha256(definition.encode()).hexdigest()[:16],
        num_ids=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        document_start=_resolve(tokenizer, directory, "document_start", document_start),
        document_end=_resolve(tokenizer, directory, "document_end", document_end),
    )


def check_vocabulary(tokenizer: TokenizerFile, vocab_size: int) -> None:
    """Refuses a tokenizer that can produce ids the model has no embedding for.

    Raises:
      UserError: naming both sizes.
    """
    if tokenizer.num_ids > vocab_size:
        raise UserError(
            f"tokenizer and model disagree: the tokenizer has ids up to {tokenizer.num_ids - 1}, "
            f"the model's vocab_size is {vocab_size}; set data.tokenizer to the model's own"
        )


class Encoder:
    """Encodes documents; special tokens written in a text stay text unless `parse_special_tokens`.

    Without `boundaries` no document_start and document_end are put around them.
    """

    def __init__(self, tokenizer: TokenizerFile, *, parse_special_tokens: bool, boundaries: bool = True) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer.definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = not parse_special_tokens
        start, end = tokenizer.document_start, tokenizer.document_end
        self._start = [start] if boundaries and start is not None else []
        self._end = [end] if boundaries and end is not None else []

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Returns uint32 [tokens] for each text, document_start and document_end included."""
        return [
            self._whole(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _whole(self, ids: list[int]) -> npt.NDArray[np.uint32]:
        """Puts the boundaries around a document's ids."""
        # By way of array: numpy takes twice as long to read a list of Python's integers.
        tokens = array("I", self._start)
        tokens.fromlist(ids)
        tokens.fromlist(self._end)
        return np.frombuffer(tokens, np.uint32)

    def encode_documents(self, documents: Sequence[Document]) -> list[npt.NDArray[np.uint32] | BadDocument]:
        """`encode` of documents' texts."""
        return list(self.encode([document.text for document in documents]))


def _definition(directory: Path) -> str:
    if not directory.is_dir():
        raise UserError(f"no tokenizer directory {directory}; set data.tokenizer")
    path = directory / "tokenizer.json"
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise UserError(f"{directory} holds no tokenizer.json, and nothing that converts to one") from error


def _resolve(tokenizer: tokenizers.Tokenizer, directory: Path, option: str, name: str | None) -> int | None:
    if name is None:
        return None
    token = _special_token(directory, f"{name}_token") if name in ("bos", "eos") else name
    if token is None:
        raise UserError(f"the tokenizer in {directory} has no {name} token: set data.{option} to null or a token")
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UserError(f"the tokenizer in {directory} has no token {token!r}: set data.{option} to null or a token")
    return number


def _special_token(directory: Path, role: str) -> str | None:
    """The token that a Hugging Face directory gives a role, e.g. bos_token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if not path.exists():
            continue
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        token = values.get(role) if isinstance(values, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    return None
