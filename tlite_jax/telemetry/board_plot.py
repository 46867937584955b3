"""A picture of what a run has gained and lost: bits per byte against the base, and KL(base || now), over steps."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import read_jsonl, replace_file

_DELTA, _KL = "bits_per_byte_delta/", "kl/"
_MOST_LINES = 10  # in a panel, those that have moved most
_ALERT = "#cb181d"


def plot_board(metrics_path: Path, destination: Path, title: str) -> None:
    """Draws every label's change against the base, and below it KL where it was measured; alerts are marked.

    Args:
      metrics_path: a run's metrics.jsonl.
      destination: .png or .svg, written atomically; its directory must exist.
      title: above the plot.

    Raises:
      UserError: nothing was evaluated, or one of the files cannot be read or written.
    """
    records = _evaluations(metrics_path)
    if not records:
        raise UserError(f"{metrics_path} has no evaluation yet; set evaluation.every")
    picture = io.BytesIO()
    figure = draw_board(records, title)
    if destination.suffix == ".svg":
        FigureCanvasSVG(figure).print_svg(picture)
    else:
        FigureCanvasAgg(figure).print_png(picture)
    try:
        replace_file(destination, picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror}; choose another place") from error


def has_board(metrics_path: Path) -> bool:
    """Whether a run has been evaluated."""
    return bool(_evaluations(metrics_path))


def _evaluations(metrics_path: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(metrics_path) if any(name.startswith(_DELTA) for name in record)]


def draw_board(records: list[dict[str, Any]], title: str) -> Figure:
    """A figure outside pyplot of records as `read_jsonl` gives them."""
    prefixes = [prefix for prefix in (_DELTA, _KL) if any(name.startswith(prefix) for name in records[-1])]
    figure = Figure(figsize=(9, 1 + 3.2 * len(prefixes)), dpi=120, layout="constrained")
    panels = figure.subplots(len(prefixes), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize=13, fontweight="bold")
    labels = {_DELTA: "bits per byte above the base", _KL: "KL(base || now), nats a token"}
    for axes, prefix in zip(panels, prefixes, strict=True):
        _draw_lines(axes, records, prefix)
        axes.set_ylabel(labels[prefix])
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    panels[-1].set_xlabel("step")
    return figure


def _draw_lines(axes: Axes, records: list[dict[str, Any]], prefix: str) -> None:
    metric = "bits_per_byte" if prefix == _DELTA else "kl"
    moved = {
        name.removeprefix(prefix): abs(value)
        for name, value in records[-1].items()
        if name.startswith(prefix) and ("=" in name or name == f"{prefix}all")
    }
    watched = {name.removeprefix(f"alert/{metric}/") for name in records[-1] if name.startswith(f"alert/{metric}/")}
    chosen = sorted(moved, key=lambda name: (name not in watched, -moved[name]))[:_MOST_LINES]
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for color, name in zip(colors, sorted(chosen), strict=False):
        points = [(record["step"], record[prefix + name]) for record in records if prefix + name in record]
        steps, values = np.array(points).T
        axes.plot(steps, values, color=color, marker="o", markersize=3, label=f"{name}  {values[-1]:+.4f}")
        alerts = [record.get(f"alert/{metric}/{name}", 0) > 0 for record in records if prefix + name in record]
        axes.plot(steps[alerts], values[alerts], color=_ALERT, linestyle="", marker="x", markersize=9)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
