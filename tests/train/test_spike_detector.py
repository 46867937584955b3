"""Which values spike: those far above the ones before them, and next to none of what noise does."""

import math

import numpy as np
import pytest

from tlite_jax.config import SpikesConfig
from tlite_jax.train.spike_detector import NUM_TO_BEGIN, SpikeDetector


def curve(steps: int, seed: int = 0) -> np.ndarray:
    """[steps, 2]: a loss that falls, with noise, and a gradient norm whose noise is a factor."""
    rng = np.random.default_rng(seed)
    loss = 2.0 + 2.0 * np.exp(-np.arange(steps) / 200) + 0.03 * rng.standard_normal(steps)
    return np.stack([loss, 0.7 * np.exp(0.15 * rng.standard_normal(steps))], axis=1)


def spikes(values: np.ndarray, **changes) -> list[tuple[int, str]]:
    """(index, name) of each spike."""
    detector = SpikeDetector(SpikesConfig(**changes))
    return [(i, spike.name) for i, (loss, norm) in enumerate(values) for spike in detector.see(loss, norm)]


def test_noise_and_descent_are_no_spikes() -> None:
    assert spikes(curve(3000)) == []
    assert spikes(np.full((300, 2), 2.0)) == []


@pytest.mark.parametrize("column", [0, 1])
def test_what_lies_far_above_is_a_spike_and_what_lies_far_below_is_none(column: int) -> None:
    values = curve(400, seed=1)
    values[300, column] *= 2.0 if column == 0 else 6.0
    assert spikes(values) == [(300, ("loss", "gradient_norm")[column])]
    off = {("loss_deviations", "gradient_norm_deviations")[column]: None}
    assert spikes(values, **off) == []
    values = curve(400, seed=1)
    values[300, column] /= 6.0
    assert spikes(values) == []


def test_deviations_are_those_of_median_and_mad() -> None:
    values = curve(129, seed=2)
    detector = SpikeDetector(SpikesConfig(loss_deviations=1e-9, gradient_norm_deviations=1e-9))
    for loss, norm in values[:128]:
        detector.see(loss, norm)
    loss, norm = detector.see(9.0, 9.0)
    for spike, past, value in ((loss, values[:128, 0], 9.0), (norm, np.log(values[:128, 1]), math.log(9.0))):
        median = np.median(past)
        mad = np.median(np.abs(past - median))
        assert spike.deviations == pytest.approx((value - median) / (1.4826 * mad))
        assert (math.log(spike.median) if spike is norm else spike.median) == pytest.approx(median)
    assert detector.window[0] == (*values[1:128, 0], 9.0)


def test_an_even_curve_has_a_width_all_the_same() -> None:
    """Half a percent of the loss, a twentieth of the logarithm."""
    detector = SpikeDetector(SpikesConfig(loss_deviations=1e-9, gradient_norm_deviations=1e-9))
    for _ in range(40):
        assert detector.see(2.0, 1.0) == []
    found = detector.see(2.1, 1.05)
    assert [spike.deviations for spike in found] == pytest.approx([0.1 / 0.01, math.log(1.05) / 0.05])


def test_nothing_is_a_spike_before_there_is_something_to_compare_with() -> None:
    jump = np.array([[2.0, 1.0]] * (NUM_TO_BEGIN - 1) + [[20.0, 10.0]] * 2)
    assert spikes(jump) == [(NUM_TO_BEGIN, name) for name in ("loss", "gradient_norm")]
    small = np.array([[2.0, 1.0]] * 16 + [[20.0, 10.0]])
    assert {i for i, _ in spikes(small, window=16)} == {16}
    assert spikes(small) == []


def test_a_new_level_is_learned_within_half_a_window() -> None:
    values = curve(600, seed=3)
    values[400:, 0] += 2.0
    found = [i for i, _ in spikes(values, window=64)]
    assert found[:10] == list(range(400, 410))
    assert 425 < found[-1] <= 433


def test_it_depends_on_its_window_alone() -> None:
    values = curve(500, seed=4)
    values[::37, 0] *= 1.6
    whole = spikes(values)
    for cut in (10, 200, 333):
        first = SpikeDetector(SpikesConfig())
        for loss, norm in values[:cut]:
            first.see(loss, norm)
        detector = SpikeDetector(SpikesConfig(), *first.window)
        rest = [(i, s.name) for i, row in enumerate(values[cut:], start=cut) for s in detector.see(*row)]
        assert rest == [found for found in whole if found[0] >= cut]
    assert len(whole) > 5
