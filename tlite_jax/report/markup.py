"""The pieces that sections of the page are made of."""

from collections.abc import Sequence

from tlite_jax.report.charts import Line
from tlite_jax.report.read import RunData


def lines(run: RunData, names: Sequence[str], *, dots: bool = False) -> list[Line]:
    """Metrics over tokens."""
    return [Line(name, *run.series(name), dots=dots) for name in names]


def side_by_side(charts: Sequence[str]) -> str:
    """Charts beside each other, as many as there is room for."""
    return f'<div class="charts">{"".join(charts)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"
