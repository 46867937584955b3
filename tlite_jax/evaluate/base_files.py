"""What was measured of a base, kept on disk.

    RUN/evaluation/base.json     which base, on what, and its scores
    RUN/evaluation/base_kl/      its next-token distributions on the replay sample

Both carry a key: the base, the very tokens that were scored and the dtype. A later start, or a later stage on the same
text, reads them; under another key the base is measured again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from tlite_jax.config import ModelConfig
from tlite_jax.evaluate.bits_per_byte import Sample, Score
from tlite_jax.evaluate.divergence import FILES, DivergenceMeter, ReplaySample
from tlite_jax.evaluate.rows import Packing
from tlite_jax.telemetry.metrics import replace_file

BASE_FILE, KL_DIRECTORY = Path("evaluation") / "base.json", Path("evaluation") / "base_kl"
_KEY_FILE = "key.json"


class BaseFiles:
    """Measurements of a base; collective over all processes, of which the first writes.

    Args:
      directory: of the run.
      earlier: a run that may have measured the same base on the same text; None: none.
      name, fingerprint: of the base.
      dtype: that is computed in.
      params: loads the base's stored, sharded parameters; called only where something is to be measured.
    """

    def __init__(
        self,
        directory: Path,
        earlier: Path | None,
        *,
        name: str,
        fingerprint: str,
        dtype: str,
        params: Callable[[], Any],
    ):
        self._directory = directory
        self._places = [directory] if earlier is None else [directory, earlier]
        self._name, self._fingerprint, self._dtype = name, fingerprint, dtype
        self._load = params
        self._loaded: list[Any] = []
        self._writes = jax.process_index() == 0

    def score_key(self, sample: Sample) -> str:
        """Names the base, the text and how it is scored."""
        return text_key(sample.names, sample.packing, [self._fingerprint, self._dtype, list(sample.num_bytes)])

    def scores(self, sample: Sample, measure: Callable[[Any], Mapping[str, Score]]) -> dict[str, Score]:
        """The base's scores, from disk or by `measure` of its parameters."""
        key = self.score_key(sample)
        records = [record for place in self._places if (record := read_record(place)) and record["key"] == key]
        if _any_process_lacks(records):
            scores = dict(measure(self._params()))
        else:
            scores = {name: Score(*sums) for name, sums in records[0]["scores"].items()}
        if self._writes:
            self._write_scores(key, scores)
        _wait("base scores")
        return scores

    def distributions(self, sample: ReplaySample, meter: DivergenceMeter, model: ModelConfig, top_k: int) -> str:
        """Sees to it that `meter` finds the base's distributions in its directory; returns their key."""
        key = text_key(sample.names, sample.packing, [self._fingerprint, self._dtype, top_k])
        places = [place for place in self._places if has_distributions(place, key)]
        if _any_process_lacks(places):
            if self._writes:
                (self._directory / KL_DIRECTORY / _KEY_FILE).unlink(missing_ok=True)
            meter.write_base(self._params(), model, top_k, writes=self._writes)
            places = []
        if self._writes and places[:1] != [self._directory]:
            for name in FILES if places else ():
                (self._directory / KL_DIRECTORY).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(
                    places[0] / KL_DIRECTORY / f"{name}.npy", self._directory / KL_DIRECTORY / f"{name}.npy"
                )
            content = {"key": key, "sizes": _sizes(self._directory)}
            replace_file(self._directory / KL_DIRECTORY / _KEY_FILE, json.dumps(content).encode())
        _wait("base distributions")
        return key

    def _params(self) -> Any:
        if not self._loaded:
            self._loaded.append(self._load())
        return self._loaded[0]

    def _write_scores(self, key: str, scores: Mapping[str, Score]) -> None:
        record = {
            "format_version": 1,
            "base": self._name,
            "fingerprint": self._fingerprint,
            "key": key,
            "scores": {name: [score.nats, score.num_bytes, score.num_tokens] for name, score in scores.items()},
        }
        (self._directory / BASE_FILE).parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._directory / BASE_FILE, json.dumps(record, ensure_ascii=False, indent=1).encode())


def text_key(names: Sequence[str], packing: Packing, extra: Any) -> str:
    """Names the very tokens that are scored, whose they are, and what else decides the result."""
    hashed = hashlib.sha256(json.dumps([list(names), packing.length, extra]).encode())
    for window in packing.windows:
        hashed.update(window.owner.to_bytes(4, "little") + len(window.inputs).to_bytes(4, "little"))
        hashed.update(window.inputs.astype("<i4").tobytes() + window.targets.astype("<i4").tobytes())
    return hashed.hexdigest()[:16]


def read_record(directory: Path) -> dict[str, Any] | None:
    """What base.json of a run says; None where there is none that this version can read."""
    try:
        record = json.loads((directory / BASE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("format_version") == 1 else None


def has_distributions(directory: Path, key: str) -> bool:
    """Whether a run directory has distributions that are whole and under this key."""
    try:
        found = json.loads((directory / KL_DIRECTORY / _KEY_FILE).read_text(encoding="utf-8"))
        return bool(found == {"key": key, "sizes": _sizes(directory)})
    except (OSError, ValueError):
        return False


def _sizes(directory: Path) -> dict[str, int]:
    return {name: (directory / KL_DIRECTORY / f"{name}.npy").stat().st_size for name in FILES}


def _any_process_lacks(found: Sequence[Any]) -> bool:
    """The same answer everywhere, also where a shared disk does not show the same at once."""
    if jax.process_count() == 1:
        return not found
    return not multihost_utils.process_allgather(bool(found)).all()


def _wait(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
