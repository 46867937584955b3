"""The interface of labellers; docs/labels.md shows one of a user's own."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from tlite_jax.data.documents import Document

UNKNOWN = "unknown"


def text_hash(text: str) -> str:
    """BLAKE2b-128 of the text in UTF-8, hexadecimal: how files of labels name a document without an id."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Labeller(Protocol):
    """Gives labels to documents.

    Attributes:
      labels: the names of the labels it gives.
    """

    labels: tuple[str, ...]

    def fingerprint(self) -> str:
        """Names everything its answers depend on but the documents; another one makes other buckets."""

    def label(self, documents: Sequence[Document]) -> Sequence[dict[str, str] | str]:
        """Returns each document's labels, or a reason to quarantine it. The answer depends on that document only."""
