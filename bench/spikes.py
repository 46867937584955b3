"""How often the spike detector cries wolf, and what it finds: `python bench/spikes.py [RUN/metrics.jsonl] [--steps N]`.

False alarms on noise that has no spikes, and spikes put into it, at the default `train.spikes`. With metrics of runs
the same for their curves as recorded: what it reports there, and what it finds of spikes put on top.
"""

import argparse
from pathlib import Path

import numpy as np

from tlite_jax.config import SpikesConfig
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.train.spike_detector import SpikeDetector

CONFIG = SpikesConfig()
EVERY, MOST = 97, 10_000  # steps from one spike that is put in to the next; that spikes are put into


def noise(kind: str, steps: int, seed: int) -> np.ndarray:
    """[steps, 2]: losses around 2 with a deviation of 0.03, gradient norms around 0.7 that vary by 15%."""
    rng = np.random.default_rng(seed)
    shape = (steps, 2)
    if kind == "normal":
        drawn = rng.standard_normal(shape)
    elif kind == "Laplace":
        drawn = rng.laplace(scale=0.5**0.5, size=shape)
    elif kind == "Student's t, 4 degrees":
        drawn = rng.standard_t(4, shape) / 2**0.5
    else:  # nine tenths of the noise stay from one step to the next
        drawn = rng.standard_normal(shape)
        for step in range(1, steps):
            drawn[step] = 0.9 * drawn[step - 1] + (1 - 0.9**2) ** 0.5 * drawn[step]
    return np.stack([2 + 0.03 * drawn[:, 0], 0.7 * np.exp(0.15 * drawn[:, 1])], axis=1)


def spiking(curve: np.ndarray) -> np.ndarray:
    """Which steps spike, bool [steps, 2]: by their loss, by their gradient norm."""
    detector = SpikeDetector(CONFIG)
    found = np.zeros(curve.shape, bool)
    for step, (loss, norm) in enumerate(curve):
        for spike in detector.see(float(loss), float(norm)):
            found[step, ("loss", "gradient_norm").index(spike.name)] = True
    return found


def detected(curve: np.ndarray, column: int, factor: float) -> float:
    """The share that is found of spikes put in at every EVERY-th step, a window after the beginning."""
    harmed = curve[:MOST].copy()
    places = np.arange(CONFIG.window, len(harmed), EVERY)
    harmed[places, column] *= factor
    return float(spiking(harmed)[places, column].mean())


def show(name: str, curve: np.ndarray) -> None:
    """Prints a line."""
    alarms = spiking(curve)
    longest = max(map(len, "".join("x" if row.any() else " " for row in alarms).split()), default=0)
    found = [detected(curve, 0, factor) for factor in (1.1, 1.25, 1.5)]
    found += [detected(curve, 1, factor) for factor in (2.0, 4.0, 8.0)]
    shares = " ".join(f"{share:6.0%}" for share in found)
    print(f"{name:24}{len(curve):>8,}{alarms[:, 0].sum():>6}{alarms[:, 1].sum():>6}{longest:>9}  {shares}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="*", help="metrics.jsonl of runs, each step logged")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{'':24}{'':>8}{'alarms':>12}{'longest':>9}  found of spikes put in: loss x, gradient norm x")
    print(f"{'':24}{'steps':>8}{'loss':>6}{'norm':>6}{'row':>9}     1.1   1.25    1.5      2      4      8")
    for kind in ("normal", "Laplace", "Student's t, 4 degrees", "correlated"):
        show(kind, noise(kind, arguments.steps, arguments.seed))
    for path in arguments.metrics:
        lines = [line for line in read_jsonl(path) if "loss" in line]
        curve = np.array([[line["loss"], line["gradient_norm"]] for line in lines])
        show(path.parent.name, curve[np.isfinite(curve).all(-1)])


if __name__ == "__main__":
    main()
