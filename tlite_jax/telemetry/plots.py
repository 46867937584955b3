"""A picture of a run: its loss and learning rate over tokens."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import read_jsonl, replace_file

_RAW, _SMOOTH, _RATE, _BAD = "#9ecae1", "#08519c", "#d95f0e", "#cb181d"


def plot_loss(metrics_path: Path, destination_png: Path, title: str) -> None:
    """Draws the loss as logged and smoothed, and the learning rate below it.

    The x axis is tokens: `tokens_seen` (cumulative) where the metrics have it, otherwise the sum of `tokens` (a
    step's), otherwise steps.

    Args:
      metrics_path: a run's metrics.jsonl.
      destination_png: written atomically; its directory must exist.
      title: above the plot.

    Raises:
      UserError: no loss was logged, or one of the files cannot be read or written.
    """
    records = [record for record in read_jsonl(metrics_path) if "loss" in record]
    if not records:
        raise UserError(f"{metrics_path} has no loss yet; plot a run that has logged a step")
    picture = io.BytesIO()
    FigureCanvasAgg(_draw(records, title)).print_png(picture)
    try:
        replace_file(destination_png, picture.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {destination_png}: {error.strerror}; choose another place") from error


def _draw(records: list[dict[str, Any]], title: str) -> Figure:
    """A figure outside pyplot: nothing global, nothing to close."""
    x, x_label = _tokens(records)
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _draw_loss(top, x, np.array([record["loss"] for record in records]))
    bottom.plot(x, [record.get("learning_rate", math.nan) for record in records], color=_RATE, linewidth=1.5)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel(x_label)
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    figure.align_ylabels()
    return figure


def _draw_loss(axes: Axes, x: np.ndarray, loss: np.ndarray) -> None:
    finite = np.isfinite(loss)
    marker = "o" if len(loss) < 50 else ""
    axes.plot(x, np.where(finite, loss, np.nan), color=_RAW, linewidth=1, marker=marker, markersize=3, label="loss")
    if finite.any():
        smooth = smoothed(loss[finite])
        axes.plot(x[finite], smooth, color=_SMOOTH, linewidth=2, label=f"smoothed, at the end {smooth[-1]:.4f}")
        axes.set_ylim(*_readable_range(loss[finite], smooth))
    if not finite.all():
        label = f"not finite: {np.count_nonzero(~finite)} of {len(loss)}"
        for position in x[~finite]:
            axes.axvline(position, color=_BAD, linewidth=1, alpha=0.6, label=label)
            label = "_"
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred Gaussian average whose standard deviation is a sixtieth of the run; it does not lag behind."""
    sigma = max(len(values) / 60, 1e-3)
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    inside = slice(len(reach) // 2, len(reach) // 2 + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def _readable_range(loss: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """All of the smoothed line and all but the wildest hundredth of the values: a spike must not flatten the rest."""
    low, high = np.quantile(loss, [0.005, 0.995])
    low, high = min(low, smooth.min()), max(high, smooth.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _tokens(records: list[dict[str, Any]]) -> tuple[np.ndarray, str]:
    steps = np.array([record["step"] for record in records], float)
    if all("tokens_seen" in record for record in records):
        return np.array([record["tokens_seen"] for record in records]), "tokens"
    if all("tokens" in record for record in records):
        taken = np.diff(steps, prepend=0) * np.array([record["tokens"] for record in records])
        return np.cumsum(taken), "tokens"
    return steps, "steps"
