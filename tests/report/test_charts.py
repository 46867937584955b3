import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tlite_jax.report.charts import MAX_POINTS, WIDTH, Line, chart, short, thinned, ticks


class Attributes(HTMLParser):
    """Collects (tag, attributes)."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def data_of(text: str) -> dict:
    (figure,) = (attributes for tag, attributes in Attributes(text).found if tag == "figure")
    return json.loads(figure["data-lines"])


def test_a_spike_among_many_points_is_kept():
    y = np.zeros(100_000)
    y[12_345], y[12_346] = 7.0, -3.0
    line = thinned(Line("loss", np.arange(100_000.0), y))
    assert len(line.x) <= MAX_POINTS
    assert {7.0, -3.0} <= set(line.y)
    assert line.x[np.argmax(line.y)] == 12_345
    assert (np.diff(line.x) > 0).all()
    assert line.x[[0, -1]].tolist() == [0, 99_999]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.93, 1.21, [1.0, 1.1, 1.2]), (0, 90e9, [0, 20e9, 40e9, 60e9, 80e9])],
)
def test_ticks_are_round_and_within(low, high, expected):
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_numbers_are_short():
    values = [0, 1e-5, 0.0125, 1.5, 2880, 288_000, 1.2e9, 90e9, -3.25]
    assert [short(value) for value in values] == ["0", "1e-5", "0.0125", "1.5", "2880", "288k", "1.2G", "90G", "-3.25"]


def test_a_line_is_drawn_where_its_values_are():
    text = chart([Line("a", np.array([0.0, 10.0, 20.0]), np.array([1.0, 3.0, 2.0]))], x_label="tokens", y_label="y")
    (path,) = re.findall(r'class="s0" d="([^"]+)"', text)
    places = [tuple(map(float, place.split())) for place in re.findall(r"[ML]([\d. ]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # higher values are further up
    assert x2 < WIDTH
    assert data_of(text)["lines"][0]["points"] == [[0, 1], [10, 3], [20, 2]]


def test_values_that_are_not_finite_are_gaps():
    y = np.array([1.0, np.nan, 2.0, np.inf, 3.0, 4.0])
    text = chart([Line("a", np.arange(6.0), y)], x_label="x", y_label="y")
    (path,) = re.findall(r'class="s0" d="([^"]+)"', text)
    assert path.count("M") == 3
    assert path.count("L") == 1
    assert [point[0] for point in data_of(text)["lines"][0]["points"]] == [0, 2, 4, 5]


def test_one_spike_does_not_flatten_the_rest():
    y = np.ones(1000) + np.linspace(0, 1, 1000)
    y[500] = 1e6
    text = chart([Line("a", np.arange(1000.0), y)], x_label="x", y_label="y")
    assert data_of(text)["y"][0][1] < 3


def test_nothing_to_draw_says_so():
    assert "nothing yet" in chart([Line("a", np.arange(2.0), np.full(2, np.nan))], x_label="x", y_label="y")
    assert "nothing yet" in chart([], x_label="x", y_label="y")


def test_one_point_and_equal_values_are_drawn():
    for x, y in (([5.0], [1.0]), ([1.0, 2.0], [0.0, 0.0])):
        text = chart([Line("a", np.array(x), np.array(y))], x_label="x", y_label="y")
        assert "nan" not in text
        assert "<path" in text


def test_names_cannot_break_the_page():
    name = "<script>alert(1)</script>\"'&"
    text = chart([Line(name, np.arange(2.0), np.arange(2.0))], x_label="x", y_label="y")
    assert "<script" not in text
    assert data_of(text)["lines"][0]["name"] == name


def test_the_average_has_the_colour_of_what_it_averages():
    x = np.arange(3.0)
    lines = [Line("raw", x, x, faint=True), Line("smooth", x, x), Line("other", x, x)]
    text = chart(lines, x_label="x", y_label="y")
    assert re.findall(r'class="((?:faint )?s\d)"', text) == ["faint s0", "s0", "s1"]
    assert [line["name"] for line in data_of(text)["lines"]] == ["smooth", "other"]
