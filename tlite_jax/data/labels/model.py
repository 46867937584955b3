"""A trained classifier as a file: numbers and JSON in one .npz, no pickle, checked when read.

C classes, F features.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlite_jax.errors import UserError, require

MODEL_VERSION = 1
PURPOSE = "a text classifier"


@dataclass(frozen=True)
class Features:
    """How a text becomes numbers: hashed counts of the n-grams of characters inside words, L2-normalised."""

    bits: int = 18
    shortest: int = 2
    longest: int = 4
    max_characters: int = 4000

    def transform(self, texts: Sequence[str]) -> Any:
        """Returns a scipy CSR matrix, float32 [texts, F]."""
        text_features = require("sklearn.feature_extraction.text", extra="labels", purpose=PURPOSE)
        vectorizer = text_features.HashingVectorizer(
            analyzer="char_wb",
            ngram_range=(self.shortest, self.longest),
            n_features=1 << self.bits,
            alternate_sign=False,
            dtype=np.float32,
        )
        return vectorizer.transform([text[: self.max_characters] for text in texts])


@dataclass(frozen=True)
class TextModel:
    """A linear classifier over `Features`.

    Attributes:
      label: the name of the label it gives.
      classes: its values.
      weights: float32 [C, F].
      biases: float32 [C].
      features: what F is.
      facts: for people: what it was trained on, and how it did.
    """

    label: str
    classes: tuple[str, ...]
    weights: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    features: Features
    facts: dict[str, Any]

    def probabilities(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Returns each class's probability, float64 [texts, C]: one-against-the-rest logistic, normalised to 1."""
        scores = np.asarray(self.features.transform(texts) @ self.weights.T, np.float64) + self.biases
        each = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
        return each / np.maximum(each.sum(axis=1, keepdims=True), 1e-300)

    def hash(self) -> str:
        """Names the model: everything that its answers depend on."""
        state = hashlib.sha256(json.dumps(self._meaning(), sort_keys=True, ensure_ascii=False).encode())
        for array in (self.weights, self.biases):
            state.update(np.ascontiguousarray(array, "<f4").tobytes())
        return state.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes the model.

        Raises:
          UserError: the file cannot be written.
        """
        meta = {**self._meaning(), "facts": self.facts, "hash": self.hash()}
        text = np.frombuffer(json.dumps(meta, ensure_ascii=False).encode(), np.uint8)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, meta=text, weights=self.weights, biases=self.biases)
            partial.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "TextModel":
        """Reads a model.

        Raises:
          UserError: not there, not a model, of another version, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(file["meta"].tobytes().decode())
                weights, biases = file["weights"], file["biases"]
        except OSError as error:
            raise UserError(f"cannot read the model {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path} is no model, or damaged: {error}; train it again") from error
        if not isinstance(meta, dict) or meta.get("model_version") != MODEL_VERSION:
            found = meta.get("model_version") if isinstance(meta, dict) else None
            raise UserError(f"{path}: model of version {found}, this program reads {MODEL_VERSION}; train it again")
        try:
            features = Features(**meta["features"])
            model = cls(meta["label"], tuple(meta["classes"]), weights, biases, features, meta["facts"])
            intact = model.hash() == meta["hash"] and model._is_consistent()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no model, or damaged: {error!r}; train it again") from error
        if not intact:
            raise UserError(f"{path} is damaged: it does not match its hash; restore it or train it again")
        return model

    def _is_consistent(self) -> bool:
        shapes = (self.weights.shape, self.biases.shape)
        return shapes == ((len(self.classes), 1 << self.features.bits), (len(self.classes),))

    def _meaning(self) -> dict[str, Any]:
        return {
            "model_version": MODEL_VERSION,
            "label": self.label,
            "classes": list(self.classes),
            "features": vars(self.features),
        }
