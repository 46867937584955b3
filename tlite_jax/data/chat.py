"""Conversations -> tokens through a tokenizer's chat template, of which the answers alone are scored."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from tlite_jax.config import ChatConfig
from tlite_jax.data.conversation import ANSWERS, Message
from tlite_jax.data.documents import BadDocument, Document
from tlite_jax.data.row_format import TOKEN, UNSCORED, Tokens
from tlite_jax.data.tokenize import Encoder, TokenizerFile
from tlite_jax.errors import UserError

_SPECIAL, _REFUSED = "a special token written in a message", "refused by the chat template"
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template as a value that travels to worker processes."""

    text: str = field(repr=False)
    special_tokens: tuple[tuple[str, str], ...]

    @property
    def hash(self) -> str:
        """Names what conversations are rendered with."""
        return hashlib.sha256(repr((self.text, self.special_tokens)).encode()).hexdigest()[:16]


def load_chat_template(directory: Path) -> ChatTemplate:
    """Reads the default chat template of a Hugging Face tokenizer directory.

    Raises:
      UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"cannot read the tokenizer in {directory}: {str(error).splitlines()[0]}") from error
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        mend = "add chat_template to its tokenizer_config.json, or set the source's chat.template: none"
        raise UserError(f"the tokenizer in {directory} has no chat template: {mend}")
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(template, tuple(sorted(tokens.items())))


class ChatEncoder:
    """Encodes conversations; document_start and document_end are added where the template does not write them."""

    def __init__(self, tokenizer: TokenizerFile, template: ChatTemplate | None, config: ChatConfig) -> None:
        self._start, self._end = tokenizer.document_start, tokenizer.document_end
        self._plain = Encoder(tokenizer, parse_special_tokens=False, boundaries=False)
        self._render = None
        if config.template == "tokenizer":
            assert template is not None, "the preparation has read it"
            self._render = _Renderer(tokenizer, template)

    def encode_documents(self, documents: Sequence[Document]) -> list[Tokens | BadDocument]:
        """Returns each conversation's tokens, UNSCORED where they are no answer's, or what is wrong with it.

        Raises:
          UserError: the template gives the beginning of a conversation other tokens when it goes on.
        """
        encode = self._encode_pair if self._render is None else partial(self._encode_chat, self._render)
        return [encode(document) for document in documents]

    def _encode_pair(self, document: Document) -> Tokens | BadDocument:
        assert document.messages is not None
        prompt, response = self._plain.encode([message["content"] for message in document.messages])
        ids = np.concatenate([prompt | UNSCORED, response])
        return self._bounded(ids, score_end=True)

    def _encode_chat(self, renderer: "_Renderer", document: Document) -> Tokens | BadDocument:
        assert document.messages is not None
        if any(renderer.has_special(message["content"]) for message in document.messages):
            return BadDocument(_SPECIAL, document.line)
        try:
            ids, is_answer = renderer.render(document.messages)
        except UserError:
            raise
        except Exception as error:  # templates raise what they like
            return BadDocument(_REFUSED, document.line, detail=str(error).splitlines()[0][:200])
        tokens = np.where(is_answer, ids, ids | UNSCORED).astype(TOKEN)
        return self._bounded(tokens, score_end=False)

    def _bounded(self, tokens: Tokens, *, score_end: bool) -> Tokens:
        pieces = [tokens]
        if self._start is not None and (not tokens.size or int(tokens[0] & ~UNSCORED) != self._start):
            pieces.insert(0, np.array([self._start], TOKEN) | UNSCORED)
        if self._end is not None and (not tokens.size or int(tokens[-1] & ~UNSCORED) != self._end):
            pieces.append(np.array([self._end], TOKEN) | (np.uint32(0) if score_end else UNSCORED))
        return np.concatenate(pieces).astype(TOKEN)


class _Renderer:
    """Renders messages to ids and says which of them are answers."""

    def __init__(self, tokenizer: TokenizerFile, template: ChatTemplate) -> None:
        from transformers import PreTrainedTokenizerFast

        parsed = tokenizers.Tokenizer.from_str(tokenizer.definition)
        parsed.no_truncation()
        parsed.no_padding()
        self._special = [token.content for token in parsed.get_added_tokens_decoder().values() if token.special]
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=parsed, chat_template=template.text, **dict(template.special_tokens)
        )
        self._marks_answers = _MARKS_ANSWERS.search(template.text) is not None

    def has_special(self, text: str) -> bool:
        """Whether a text contains what would become a special token."""
        return any(token in text for token in self._special)

    def render(self, messages: Sequence[Message]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Returns ids, uint32 [tokens], and whether each is part of an answer, bool [tokens]."""
        if not self._marks_answers:
            return self._by_prefixes(messages)
        found: Any = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(found["input_ids"], np.uint32), np.array(found["assistant_masks"], bool)

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """An answer's tokens are those that it adds to what asks for it; each rendering must begin the next."""
        whole = self._ids(messages)
        is_answer = np.zeros(len(whole), bool)
        for number, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            before, after = self._ids(messages[:number], ask=True), self._ids(messages[: number + 1])
            if after[: len(before)] != before or whole[: len(after)] != after:
                raise UserError(
                    "the chat template renders the beginning of a conversation differently once it goes on, so that "
                    "answers cannot be told: mark them in it with {% generation %} ... {% endgeneration %}"
                )
            is_answer[len(before) : len(after)] = True
        return np.array(whole, np.uint32), is_answer

    def _ids(self, messages: Sequence[Message], *, ask: bool = False) -> list[int]:
        found: Any = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=ask, return_dict=False
        )
        return list(found)
