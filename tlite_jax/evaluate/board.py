"""The forgetting board: what a model has gained and lost against its base, per label and bucket, and what follows.

Pure arithmetic over measurements; nothing here touches a device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tlite_jax.config import EvaluationConfig
from tlite_jax.data.buckets import HeldOutBucket
from tlite_jax.errors import UserError
from tlite_jax.evaluate.bits_per_byte import Score
from tlite_jax.evaluate.divergence import Divergence
from tlite_jax.evaluate.groups import Group, group_of, label_groups
from tlite_jax.telemetry.evaluated import Table
from tlite_jax.telemetry.metrics import Metrics

_MOST_ROWS = 30  # of the table for people; the files hold everything


class Measurement(NamedTuple):
    """Bucket name -> what was measured of it; divergences only of those in the replay sample."""

    scores: Mapping[str, Score]
    divergences: Mapping[str, Divergence]

    def to_json(self) -> dict[str, Any]:
        """Sums as numbers, from which everything else follows."""
        return {
            "scores": {name: [score.nats, score.num_bytes, score.num_tokens] for name, score in self.scores.items()},
            "kl": {name: list(divergence) for name, divergence in self.divergences.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Measurement":
        """The inverse of `to_json`."""
        return cls(
            {name: Score(*sums) for name, sums in values["scores"].items()},
            {name: Divergence(*sums) for name, sums in values["kl"].items()},
        )


class Line(NamedTuple):
    """A group's numbers: bits per byte now and under the base, and KL(base || now) in nats a token, if sampled."""

    name: str
    bits: float
    base: float
    kl: float | None

    @property
    def delta(self) -> float:
        """Bits per byte more than the base: above 0 is worse."""
        return self.bits - self.base


class Alert(NamedTuple):
    """A watched group that is worse than it may be."""

    name: str
    metric: Literal["bits_per_byte", "kl"]
    worse_by: float
    limit: float
    action: Literal["log", "stop"]

    def __str__(self) -> str:
        """One line."""
        what = {
            "bits_per_byte": f"{self.worse_by:.4f} bits per byte worse than the base",
            "kl": f"{self.worse_by:.4f} nats a token away from the base",
        }[self.metric]
        return f"ALERT {self.name}: {what}, the limit is {self.limit:g}"


class Board:
    """Reads measurements against a base.

    Args:
      buckets: with held-out documents.
      sampled: names of the buckets in the replay sample of KL.
      config: what is watched, and what is best.
      base: of the base; its divergences are not looked at.

    Raises:
      UserError: a watch or an objective that matches no held-out bucket, or none in the replay sample.
    """

    def __init__(
        self, buckets: Sequence[HeldOutBucket], sampled: Sequence[str], config: EvaluationConfig, base: Measurement
    ):
        self._sampled = frozenset(sampled)
        self._base = base
        self._watched = [
            (watch, self._group(watch.select, watch.metric, buckets, f"evaluation.watch[{number}].select"))
            for number, watch in enumerate(config.watch)
        ]
        terms = config.best.terms() if config.best else []
        self._terms = [
            (term, weight, self._group(term.select, term.metric, buckets, "evaluation.best.objective"))
            for term, weight in terms
        ]
        special = [group for _, group in self._watched] + [group for _, _, group in self._terms]
        everything = [group_of({}, buckets, "all")] if buckets else []
        labelled = [*everything, *label_groups(buckets)]
        self._special = {group.name for group in special}
        self.groups = list({group.name: group for group in [*special, *labelled]}.values())
        names = {group.name for group in self.groups}
        self.buckets = [Group(bucket.name, (bucket.name,)) for bucket in buckets if bucket.name not in names]

    def _group(self, select: Mapping[str, str], metric: str, buckets: Sequence[HeldOutBucket], field: str) -> Group:
        group = group_of(select, buckets, field)
        if metric == "kl" and not self._sampled.intersection(group.members):
            raise UserError(f"{field} {group.name}: no bucket of it is in the sample that evaluation.kl.select names")
        return group

    def line(self, group: Group, measured: Measurement) -> Line:
        """A group's numbers."""
        now, base = (_total(group, part.scores) for part in (measured, self._base))
        sampled = [measured.divergences[name] for name in group.members if name in measured.divergences]
        divergence = Divergence(sum(part.nats for part in sampled), sum(part.num_tokens for part in sampled))
        kl = divergence.per_token if divergence.num_tokens else None
        return Line(group.name, now.bits_per_byte, base.bits_per_byte, kl)

    def lines(self, measured: Measurement) -> list[Line]:
        """Of what is watched or part of the objective, of everything, of every label's values and of every bucket."""
        return [self.line(group, measured) for group in [*self.groups, *self.buckets]]

    def metrics(self, measured: Measurement) -> Metrics:
        """`bits_per_byte/NAME`, `bits_per_byte_delta/NAME`, `kl/NAME`, `alert/METRIC/NAME` and `objective`."""
        lines = self.lines(measured)
        metrics = {f"bits_per_byte/{line.name}": line.bits for line in lines}
        metrics |= {f"bits_per_byte_delta/{line.name}": line.delta for line in lines}
        metrics |= {f"kl/{line.name}": line.kl for line in lines if line.kl is not None}
        metrics |= {f"alert/{watch.metric}/{group.name}": 0.0 for watch, group in self._watched}
        metrics |= {f"alert/{alert.metric}/{alert.name}": 1.0 for alert in self.alerts(measured)}
        objective = self.objective(measured)
        return metrics if objective is None else metrics | {"objective": objective}

    def alerts(self, measured: Measurement) -> list[Alert]:
        """The watches whose limit is passed."""
        result = []
        for watch, group in self._watched:
            worse_by = self._value("delta" if watch.metric == "bits_per_byte" else "kl", group, measured)
            if worse_by is not None and worse_by > watch.worse_by:
                result.append(Alert(group.name, watch.metric, worse_by, watch.worse_by, watch.action))
        return result

    def objective(self, measured: Measurement) -> float | None:
        """The weighted sum; None where none is asked for, or a part of it was not measured."""
        total = 0.0 if self._terms else None
        for term, weight, group in self._terms:
            value = self._value(term.metric, group, measured)
            total = None if total is None or value is None else total + weight * value
        return total

    def _value(self, metric: str, group: Group, measured: Measurement) -> float | None:
        line = self.line(group, measured)
        return {"bits_per_byte": line.bits, "delta": line.delta, "kl": line.kl}[metric]

    def table(self, measured: Measurement, best: int | None = None, notes: Sequence[str] = ()) -> Table:
        """For people: the groups, those watched first, and never so many that they scroll away.

        Args:
          measured: now.
          best: the best step so far, to be named.
          notes: further lines.
        """
        lines = [self.line(group, measured) for group in self.groups]
        shown = lines
        if len(lines) > _MOST_ROWS:
            special = [line for line in lines if line.name in {*self._special, "all"}]
            others = sorted((line for line in lines if line not in special), key=lambda line: -line.delta)
            shown = [*special, *others[: max(0, _MOST_ROWS - len(special))]]
        with_kl = any(line.kl is not None for line in shown)
        header = ("held-out text", "bits per byte", "base", "change", *(["KL"] if with_kl else []))
        alerts = tuple(str(alert) for alert in self.alerts(measured))
        notes = list(notes)
        objective = self.objective(measured)
        if objective is not None:
            notes.append(f"objective {objective:.4f}" + ("" if best is None else f", best at step {best}"))
        if len(shown) < len(lines):
            notes.append(f"{len(lines) - len(shown)} more groups, less worse than these, are in board.jsonl")
        return Table(header, tuple(_cells(line, with_kl) for line in shown), alerts, tuple(notes))


def _total(group: Group, scores: Mapping[str, Score]) -> Score:
    first, *rest = (scores[name] for name in group.members)
    return sum(rest, first)


def _cells(line: Line, with_kl: bool) -> tuple[str, ...]:
    cells = line.name, f"{line.bits:.4f}", f"{line.base:.4f}", f"{line.delta:+.4f}"
    return (*cells, "" if line.kl is None else f"{line.kl:.4f}") if with_kl else cells
