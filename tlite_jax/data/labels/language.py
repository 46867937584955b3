"""Language identification with py3langid: naive Bayes over byte n-grams, 97 languages, offline."""

import functools
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tlite_jax.config.labels import LanguageLabellerConfig
from tlite_jax.data.documents import Document
from tlite_jax.data.labels.labeller import UNKNOWN
from tlite_jax.errors import UserError, require


class LanguageLabeller:
    """Labels documents with ISO 639-1 codes, or unknown."""

    def __init__(self, config: LanguageLabellerConfig) -> None:
        self._config = config
        self.labels: tuple[str, ...] = (config.label,)
        self._identifier = _identifier(config.languages)

    def fingerprint(self) -> str:
        """The library's version, which its model comes with."""
        return f"py3langid {version('py3langid')}"

    def label(self, documents: Sequence[Document]) -> list[dict[str, str]]:
        """Looks at the beginning of each document."""
        return [{self._config.label: self._language(document.text)} for document in documents]

    def _language(self, text: str) -> str:
        code, confidence = self._identifier.classify(text[: self._config.max_characters])
        return code if confidence >= self._config.min_confidence else UNKNOWN


@functools.lru_cache(maxsize=4)  # reading the model takes a second
def _identifier(languages: tuple[str, ...] | None) -> Any:
    langid = require("py3langid.langid", extra="labels", purpose="language identification")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if languages is not None:
        unknown = sorted(set(languages) - set(identifier.nb_classes))
        if unknown:
            known = ", ".join(sorted(identifier.nb_classes))
            raise UserError(f"labeller language: no language {unknown[0]!r}; there are {known}")
        identifier.set_languages(list(languages))
    return identifier
