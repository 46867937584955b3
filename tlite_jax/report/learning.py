"""What a run learns: its loss, whole and by bucket, and which parts of the model move."""

from collections.abc import Callable, Sequence

import numpy as np

from tlite_jax.report.charts import Line, chart
from tlite_jax.report.markup import lines, side_by_side
from tlite_jax.report.read import RunData
from tlite_jax.telemetry.plots import smoothed

_MOST_BUCKETS = 8
_GROUPS: dict[str, Callable[[str], bool]] = {
    "attention": lambda name: name.startswith("attention."),
    "mlp": lambda name: name.startswith("mlp."),
    "embedding, norms and head": lambda name: "." not in name,
}


def learning(run: RunData) -> str:
    """The section."""
    x, loss = run.series("loss")
    curve = [Line("loss", x, loss, faint=True)]
    finite = np.isfinite(loss)
    if finite.any():
        curve.append(Line("loss, smoothed", x[finite], smoothed(loss[finite])))
    charts = [
        chart(curve, x_label="tokens", y_label="loss (nats a token)"),
        chart(lines(run, ["gradient_norm"]), x_label="tokens", y_label="gradient norm, before clipping", zero=True),
        chart(lines(run, ["learning_rate"]), x_label="tokens", y_label="learning rate", zero=True),
        *_buckets(run),
    ]
    broken = int(np.count_nonzero(~finite))
    alert = (
        f'<p class="alert bad">the loss was not finite at {broken} of {len(loss)} logged steps</p>' if broken else ""
    )
    return f"<h2>Learning</h2>{alert}{side_by_side(charts)}{_groups(run)}"


def _buckets(run: RunData) -> list[str]:
    """The loss of the buckets that most batches have, smoothed."""
    found = []
    for name in run.names("bucket_loss"):
        x, loss = run.series(f"bucket_loss/{name}")
        finite = np.isfinite(loss)
        if finite.any():
            found.append(Line(name, x[finite], smoothed(loss[finite])))
    if not found:
        return []
    most = sorted(found, key=lambda line: -len(line.x))[:_MOST_BUCKETS]
    left_out = f", {len(most)} of {len(found)} buckets" if len(found) > len(most) else ""
    return [chart(most, x_label="tokens", y_label=f"loss by bucket (nats a token), smoothed{left_out}")]


def _groups(run: RunData) -> str:
    names = run.names("group_gradient_norm")
    if not names:
        return ""
    charts = []
    for what, belongs in _GROUPS.items():
        groups = [name for name in names if belongs(name)]
        charts += [
            chart(_norms(run, groups), x_label="tokens", y_label=f"gradient norm: {what}", zero=True),
            chart(_moves(run, groups), x_label="tokens", y_label=f"norm of update / norm of parameters: {what}"),
        ]
    return f"<details><summary>norms by group of parameters</summary>{side_by_side(charts)}</details>"


def _norms(run: RunData, groups: Sequence[str]) -> list[Line]:
    return [Line(group, *run.series(f"group_gradient_norm/{group}")) for group in groups]


def _moves(run: RunData, groups: Sequence[str]) -> list[Line]:
    """How far a step moves each group, relative to its size; a group that is zero has no such number."""
    result = []
    for group in groups:
        x, update = run.series(f"group_update_norm/{group}")
        size = run.series(f"group_parameter_norm/{group}")[1]
        result.append(Line(group, x, np.divide(update, size, out=np.full_like(update, np.nan), where=size > 0)))
    return result
