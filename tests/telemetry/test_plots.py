import math
import sys

import matplotlib.image
import numpy as np
import pytest

from tlite_jax.errors import UserError
from tlite_jax.telemetry.metrics import JsonlSink, MetricsWriter, read_jsonl
from tlite_jax.telemetry.plots import _draw, plot_loss, smoothed


def write(path, num_steps, every=1, **extra):
    random = np.random.default_rng(0)
    with MetricsWriter([JsonlSink(path)]) as writer:
        for step in range(every, num_steps + 1, every):
            loss = 2 + 2 * math.exp(-step / num_steps * 5) + 0.1 * random.standard_normal()
            values = {"loss": loss, "learning_rate": 1e-5 * min(1, step / 10)}
            writer.write(step, values | {name: make(step) for name, make in extra.items()})


def test_the_picture_is_there_and_not_empty(tmp_path):
    path, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write(path, 1000, tokens=lambda step: 1024)
    plot_loss(path, picture, "SmolLM2-135M, адаптация к русскому")
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape == (672, 1080, 3)
    height = pixels.shape[0]
    blue = (pixels[..., 2] > pixels[..., 0] + 0.2).any(axis=1)
    orange = (pixels[..., 0] > pixels[..., 2] + 0.4).any(axis=1)
    assert blue[: height // 2].any()
    assert orange[height * 3 // 4 :].any()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_pyplots_global_state_is_left_alone(tmp_path):
    write(tmp_path / "m", 5)
    plot_loss(tmp_path / "m", tmp_path / "p.png", "five")
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        assert pyplot.get_fignums() == []


def drawn(path):
    top, bottom = _draw(read_jsonl(path), "title").axes
    return top, bottom


@pytest.mark.parametrize("key", ["tokens_seen", "tokens"])
def test_x_is_tokens(tmp_path, key):
    write(tmp_path / "m", 100, every=10, **{key: lambda step: 512 * (step if key == "tokens_seen" else 1)})
    top, bottom = drawn(tmp_path / "m")
    assert bottom.get_xlabel() == "tokens"
    for line in top.lines:
        np.testing.assert_array_equal(line.get_xdata(), 512 * np.arange(10, 101, 10))


def test_x_is_steps_where_no_tokens_are_known(tmp_path):
    write(tmp_path / "m", 20)
    assert drawn(tmp_path / "m")[1].get_xlabel() == "steps"


def test_a_spike_does_not_flatten_the_rest_and_nan_is_marked(tmp_path):
    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        for step in range(1, 1001):
            loss = {500: 1e6, 700: math.nan, 701: math.inf}.get(step, 2 + step % 10 / 10)
            writer.write(step, {"loss": loss if step != 500 else 50.0})
    top, _ = drawn(tmp_path / "m")
    assert top.get_ylim()[1] < 10
    assert "not finite: 2 of 1000" in [text.get_text() for text in top.get_legend().get_texts()]
    plot_loss(tmp_path / "m", tmp_path / "p.png", "spikes")


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0], [math.nan], [0.0, 0.0]])
def test_short_and_flat_runs_are_drawn(tmp_path, losses):
    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(step, {"loss": loss})
    plot_loss(tmp_path / "m", tmp_path / "p.png", "short")
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0


def test_nothing_to_draw_is_refused(tmp_path):
    with MetricsWriter([JsonlSink(tmp_path / "m")]) as writer:
        writer.write(1, {"bits_per_byte/ru": 1.0})
    with pytest.raises(UserError, match="no loss yet"):
        plot_loss(tmp_path / "m", tmp_path / "p.png", "none")
    write(tmp_path / "m", 2)
    with pytest.raises(UserError, match="cannot write"):
        plot_loss(tmp_path / "m", tmp_path / "absent" / "p.png", "none")
    assert not (tmp_path / "p.png").exists()


def test_smoothing_keeps_a_constant_and_follows_a_slope():
    np.testing.assert_allclose(smoothed(np.full(500, 3.0)), 3.0)
    slope = np.linspace(4, 2, 600)
    smooth = smoothed(slope)
    np.testing.assert_allclose(smooth[30:-30], slope[30:-30])  # no lag
    assert abs(smooth[0] - 4) < 0.05
    assert (np.diff(smooth) < 0).all()
    noisy = np.random.default_rng(1).standard_normal(600)
    assert smoothed(noisy).std() < 0.35 * noisy.std()
