"""A trained classifier as a labeller."""

from collections.abc import Sequence

from tlite_jax.config.labels import ClassifierLabellerConfig
from tlite_jax.data.documents import Document
from tlite_jax.data.labels.labeller import UNKNOWN
from tlite_jax.data.labels.model import TextModel


class ClassifierLabeller:
    """Gives the label that its model was trained for."""

    def __init__(self, config: ClassifierLabellerConfig) -> None:
        self._min_confidence = config.min_confidence
        self._model = TextModel.load(config.path)
        self.labels: tuple[str, ...] = (self._model.label,)

    def fingerprint(self) -> str:
        """Names the model by its content."""
        return self._model.hash()

    def label(self, documents: Sequence[Document]) -> list[dict[str, str]]:
        """The likeliest class of each document, or unknown."""
        probabilities = self._model.probabilities([document.text for document in documents])
        best = probabilities.argmax(axis=1)
        return [
            {self._model.label: self._model.classes[choice] if row[choice] >= self._min_confidence else UNKNOWN}
            for choice, row in zip(best.tolist(), probabilities, strict=True)
        ]
