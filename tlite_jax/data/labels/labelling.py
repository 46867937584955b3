"""The labellers of a preparation: made from its config, and run one after another."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlite_jax.config import digest
from tlite_jax.config.labels import LabellerConfig
from tlite_jax.data.documents import BadDocument, Document
from tlite_jax.data.labels.labeller import Labeller
from tlite_jax.errors import UserError


def make_labeller(config: LabellerConfig, index_directory: Path) -> Labeller:
    """Makes one labeller.

    Args:
      config: one of `data.prepare.labellers`.
      index_directory: where a column's values are indexed, once for all processes.

    Raises:
      UserError: a file, module or package that is not there, or a model that cannot be read.
    """
    # Imported here: each kind needs packages of its own.
    if config.kind == "language":
        from tlite_jax.data.labels.language import LanguageLabeller

        return LanguageLabeller(config)
    if config.kind == "classifier":
        from tlite_jax.data.labels.classifier import ClassifierLabeller

        return ClassifierLabeller(config)
    if config.kind == "column":
        from tlite_jax.data.labels.column import ColumnLabeller

        return ColumnLabeller(config, index_directory)
    return _load(config.target, config.options)


class Labellers:
    """All labellers of a preparation, run one after another."""

    def __init__(self, configs: Sequence[LabellerConfig], index_directory: Path) -> None:
        self._configs = list(configs)
        self._labellers = [make_labeller(config, index_directory) for config in configs]

    @property
    def labels(self) -> list[str]:
        """The labels that they give, each once."""
        return list(dict.fromkeys(name for labeller in self._labellers for name in labeller.labels))

    def fingerprints(self) -> tuple[str, ...]:
        """Of each, its settings included; where its files lie does not matter."""
        settings = [config.model_dump(mode="json", exclude={"path", "paths"}) for config in self._configs]
        return tuple(
            digest([values, labeller.fingerprint()]) for values, labeller in zip(settings, self._labellers, strict=True)
        )

    def apply(self, source: str, documents: Sequence[Document]) -> list[Document | BadDocument]:
        """Returns the documents with their labels; a label that a document has stays unless `replace` is set."""
        result: list[Document | BadDocument] = list(documents)
        for config, labeller in zip(self._configs, self._labellers, strict=True):
            if config.sources is not None and source not in config.sources:
                continue
            wanting = [
                (place, document)
                for place, document in enumerate(result)
                if isinstance(document, Document)
                and (config.replace or not set(labeller.labels) <= document.labels.keys())
            ]
            answers = labeller.label([document for _, document in wanting]) if wanting else []
            for (place, document), answer in zip(wanting, answers, strict=True):
                if isinstance(answer, str):
                    result[place] = BadDocument(answer, document.line)
                else:
                    document.labels.update(
                        {name: value for name, value in answer.items() if config.replace or name not in document.labels}
                    )
        return result


@dataclass(frozen=True)
class Labelling:
    """Labellers as a value that travels to worker processes; they are opened there.

    Attributes:
      configs: `data.prepare.labellers`.
      index_directory: see `make_labeller`.
      fingerprints: what they were when the preparation began.
    """

    configs: tuple[LabellerConfig, ...] = ()
    index_directory: Path = Path()
    fingerprints: tuple[str, ...] = ()

    @classmethod
    def of(cls, configs: Sequence[LabellerConfig], index_directory: Path) -> "Labelling":
        """Opens labellers to know what they are."""
        return cls(tuple(configs), index_directory, Labellers(configs, index_directory).fingerprints())

    def open(self) -> Labellers:
        """The labellers, made at most once in a process.

        Raises:
          UserError: they are no longer what they were.
        """
        key = (self.fingerprints, self.index_directory)
        if key not in _opened:
            labellers = Labellers(self.configs, self.index_directory)
            if labellers.fingerprints() != self.fingerprints:
                raise UserError("a labeller has changed since the preparation began; start again")
            _opened[key] = labellers
        return _opened[key]


_opened: dict[tuple[tuple[str, ...], Path], Labellers] = {}


def _load(target: str, options: dict[str, Any]) -> Labeller:
    """Makes a labeller of the user's from `module:Class`."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        labeller = found(**options)
    except Exception as error:
        raise UserError(f"labeller {target}: {type(error).__name__}: {error}; is it on PYTHONPATH?") from error
    lacking = [part for part in ("labels", "fingerprint", "label") if not hasattr(labeller, part)]
    if lacking:
        raise UserError(f"labeller {target} has no {', '.join(lacking)}; docs/labels.md says what it must have")
    return labeller
