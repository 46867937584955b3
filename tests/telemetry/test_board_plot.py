"""The picture of the board: every label, alerts marked, PNG and SVG."""

import matplotlib.image
import pytest

from tlite_jax.errors import UserError
from tlite_jax.telemetry.board_plot import draw_board, plot_board
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, read_jsonl


def write(path, labels=("language=ru", "language=en", "all"), kl=True):
    with MetricsWriter([JsonlSink(path)]) as writer:
        for step in (0, 10, 20):
            writer.write(step, {"loss": 1.0})
            values = {f"bits_per_byte_delta/{name}": step * (number - 1) / 100 for number, name in enumerate(labels)}
            values["bits_per_byte_delta/some.bucket"] = 9.0
            if kl:
                values["kl/language=en"] = step / 50
            values["alert/bits_per_byte/language=en"] = float(step == 20)
            writer.write(step, values)


def test_lines_are_the_labels_and_crosses_the_alerts(tmp_path):
    write(tmp_path / "m")
    deltas, divergences = draw_board(read_jsonl(tmp_path / "m"), "title").axes
    lines = {line.get_label().split()[0]: line for line in deltas.lines if line.get_label()[0] != "_"}
    assert set(lines) == {"all", "language=en", "language=ru"}
    assert lines["language=ru"].get_xdata().tolist() == [0, 10, 20]
    assert lines["language=ru"].get_ydata().tolist() == pytest.approx([0, -0.1, -0.2])
    crosses = [line.get_xdata().tolist() for line in deltas.lines if line.get_marker() == "x"]
    assert sorted(crosses) == [[], [], [20]]
    (line,) = [line for line in divergences.lines if line.get_marker() == "o"]
    assert line.get_ydata().tolist() == pytest.approx([0, 0.2, 0.4])


def test_of_many_labels_those_that_moved_most_are_drawn(tmp_path):
    write(tmp_path / "m", [f"source=s{number}" for number in range(50)] + ["language=en"], kl=False)
    (deltas,) = draw_board(read_jsonl(tmp_path / "m"), "title").axes
    names = {line.get_label().split()[0] for line in deltas.lines if line.get_marker() == "o"}
    assert names == {"language=en", *(f"source=s{number}" for number in range(41, 50))}


@pytest.mark.parametrize("name", ["board.png", "board.svg"])
def test_the_picture_is_there(tmp_path, name):
    write(tmp_path / "m")
    plot_board(tmp_path / "m", tmp_path / name, "SmolLM2-135M, адаптация к русскому")
    if name.endswith("svg"):
        assert "<svg" in (tmp_path / name).read_text(encoding="utf-8")
    else:
        assert matplotlib.image.imread(tmp_path / name).std() > 0


def test_nothing_to_draw_is_refused(tmp_path):
    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        writer.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"no evaluation yet; set evaluation.every"):
        plot_board(tmp_path / "m", tmp_path / "p.png", "none")
    write(tmp_path / "n")
    with pytest.raises(UserError, match="cannot write"):
        plot_board(tmp_path / "n", tmp_path / "absent" / "p.png", "none")
