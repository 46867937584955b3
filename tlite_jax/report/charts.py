"""Line charts as SVG that a page carries in itself: readable on a phone, in print, and with the pointer on a line.

Colours are CSS variables, so that a page decides them once, for light, dark and paper.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 460, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 30
MAX_POINTS = 600
NUM_COLOURS = 8
Scale = Callable[[float], float]
# What every chart is cut to; a page holds it once.
CLIP = (
    f'<svg width="0" height="0"><clipPath id="plot"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT}" '
    f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath></svg>'
)


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      name: in the legend.
      x, y: [points] float, x ascending; points whose y is not finite are gaps.
      faint: drawn thin, in the colour of the line that follows (raw values below their average).
      dots: marks each point.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False
    dots: bool = False


def chart(lines: Sequence[Line], *, x_label: str, y_label: str, zero: bool = False) -> str:
    """Draws lines over a common x axis.

    Args:
      lines: at least one with a finite point, else a sentence says that there is nothing yet.
      x_label, y_label: with units.
      zero: the y axis includes 0.

    Returns:
      A <figure> with its legend; the points that the pointer shows are in its data-lines attribute.
    """
    shown = [thinned(line) for line in lines if np.isfinite(line.y).any()]
    if not shown:
        return '<p class="none">nothing yet</p>'
    x_range = _range(np.concatenate([line.x[np.isfinite(line.y)] for line in shown]), pad=0.0)
    values = np.concatenate([_without_wild(line.y) for line in shown])
    y_range = _range(np.append(values, 0.0) if zero else values, pad=0.05)
    to_x = _scale(x_range, _LEFT, WIDTH - _RIGHT)
    to_y = _scale(y_range, HEIGHT - _BOTTOM, _TOP)
    colours = _colours(shown)
    parts = [_grid(x_range, y_range, to_x, to_y, x_label)]
    for line, colour in zip(shown, colours, strict=True):
        parts.append(_path(line, colour, to_x, to_y))
    named = [(line, colour) for line, colour in zip(shown, colours, strict=True) if not line.faint]
    data = {
        "x": [x_range, [_LEFT, WIDTH - _RIGHT]],
        "y": [y_range, [HEIGHT - _BOTTOM, _TOP]],
        "label": x_label,
        "lines": [{"name": line.name, "colour": colour, "points": _points(line)} for line, colour in named],
    }
    legend = "".join(f'<li><i class="c{colour}"></i>{html.escape(line.name)}</li>' for line, colour in named)
    return (
        f'<figure class="chart" data-lines="{html.escape(json.dumps(data))}">'
        f"<figcaption>{html.escape(y_label)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)}">'
        f"{''.join(parts)}</svg>"
        f'<ul class="legend">{legend}</ul></figure>'
    )


def thinned(line: Line) -> Line:
    """At most MAX_POINTS points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(line.x) <= MAX_POINTS:
        return line
    keep: set[int] = {0, len(line.x) - 1}
    for part in np.array_split(np.arange(len(line.x)), MAX_POINTS // 2 - 1):
        finite = part[np.isfinite(line.y[part])]
        if len(finite):
            keep |= {int(finite[np.argmin(line.y[finite])]), int(finite[np.argmax(line.y[finite])])}
        else:
            keep.add(int(part[0]))
    index = np.array(sorted(keep))
    return Line(line.name, line.x[index], line.y[index], line.faint, line.dots)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten, `most` at most."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters: 0.012, 1.5, 288k, 1.2G, 1e-5."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale * (10 if unit == "k" else 1):
            return f"{value / scale:.4g}{unit}"
    return f"{value:.5g}"


def _colours(lines: Sequence[Line]) -> list[int]:
    """A faint line has the colour of the next one that is not."""
    result, colour = [], 0
    for line in lines:
        result.append(colour % NUM_COLOURS)
        colour += not line.faint
    return result


def _without_wild(y: np.ndarray) -> np.ndarray:
    """What decides the y axis: all but the wildest hundredth, so that one spike does not flatten the rest."""
    finite = y[np.isfinite(y)]
    if len(finite) < 100:
        return finite
    low, high = np.quantile(finite, [0.005, 0.995])
    return finite[(finite >= low) & (finite <= high)]


def _range(values: np.ndarray, pad: float) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = pad * (high - low) if high > low else 0.05 * abs(high) or 1.0
    return [low - margin, high + margin]


def _scale(values: Sequence[float], first: float, last: float) -> Scale:
    """Maps a range of values onto a range of places."""
    factor = (last - first) / (values[1] - values[0])
    return lambda value: first + (value - values[0]) * factor


def _grid(x_range: Sequence[float], y_range: Sequence[float], to_x: Scale, to_y: Scale, x_label: str) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in ticks(y_range[0], y_range[1], 5):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in ticks(x_range[0], x_range[1], 5):
        x = to_x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<text x="{right}" y="{HEIGHT - 4}" text-anchor="end">{html.escape(x_label)}</text>')
    return "".join(parts)


def _path(line: Line, colour: int, to_x: Scale, to_y: Scale) -> str:
    kind = f"{'faint ' if line.faint else ''}s{colour}"
    commands, pen_down = [], False
    marks = []
    for x, y in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(y):
            pen_down = False
            continue
        place = f"{to_x(x):.1f} {to_y(y):.1f}"
        commands.append(("L" if pen_down else "M") + place)
        pen_down = True
        if line.dots or len(line.x) == 1:
            marks.append(f'<circle class="c{colour}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="2.6"/>')
    return f'<path clip-path="url(#plot)" class="{kind}" d="{"".join(commands)}"/>{"".join(marks)}'


def _points(line: Line) -> list[list[float]]:
    finite = np.isfinite(line.y)
    pairs = zip(line.x[finite].tolist(), line.y[finite].tolist(), strict=True)
    return [[float(f"{x:.8g}"), float(f"{y:.5g}")] for x, y in pairs]
