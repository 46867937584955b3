"""The benchmark against torch on a CPU: both contenders on a small problem, and what is made of their numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import _cpu_report
from bench._cpu_report import Turn

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {"ours": "ours", "eager": "torch eager"}


def turn(ours: float, eager: float, missing: float | None) -> Turn:
    steps = {
        name: {"seconds": seconds, "cpu_seconds": 2 * seconds, "loss": 10.0}
        for name, seconds in (("ours", ours), ("eager", eager))
    }
    return Turn(steps, {"ours": 100.0, "eager": 200.0}, missing)


def test_both_contenders_take_the_same_steps_and_the_parts_add_up():
    options = ["--layers", "1", "--batch", "1", "--sequence", "32", "--repeats", "1", "--minutes", "0", "--no-compile"]
    quick = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
    command = [sys.executable, str(ROOT / "bench/cpu_step.py"), *options, "--parts"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=quick)
    assert done.returncode == 0, done.stderr
    assert "BLAS" in done.stdout.splitlines()[0]
    summary = json.loads(done.stdout.splitlines()[-1])
    ours, eager = summary["rows"]["ours"], summary["rows"]["eager"]
    # The second step's: after one update, so of the gradients too.
    assert ours["loss"] == pytest.approx(eager["loss"], rel=2e-5)
    assert 0 < ours["matmul_share"] < 1
    assert summary["turns"] == 1
    parts = summary["parts"]
    products = {name: seconds for name, seconds in parts.items() if name.endswith("matrix products")}
    assert len(products) == 2
    assert 0 < sum(products.values()) < parts["step"]


def test_turns_without_free_cores_do_not_count():
    turns = [turn(1.0, 2.0, 0.0), turn(5.0, 50.0, 0.5), turn(1.0, 4.0, 0.09), turn(1.0, 3.0, None)]
    rows = _cpu_report.rows(turns, {"ours": 1, "eager": 1}, tokens=60, flops_per_token=1.0)
    assert rows["eager"]["ours_over_it"] == 3.0
    assert rows["ours"]["tokens_per_second"] == 60.0
    assert rows["eager"]["matmul_share"] == pytest.approx(60 / 3 / 200)
    assert _cpu_report.counted(turns, 3) == "Medians of 3 turns of 4."
    assert "fewer" in _cpu_report.counted(turns, 4)


def test_a_busy_machines_numbers_are_marked():
    turns = [turn(1.0, 2.0, 0.3), turn(3.0, 9.0, 0.6)]
    assert _cpu_report.rows(turns, {"ours": 1, "eager": 1}, 60, 1.0)["eager"]["ours_over_it"] == 2.5
    assert _cpu_report.counted(turns, 2).startswith("NONE of 2")


@pytest.mark.parametrize(
    ("others_cores", "threads", "cores", "expected"),
    [(0.0, 2, 2, 0.0), (1.0, 2, 2, 0.5), (1.0, 1, 2, 0.0), (1.5, 1, 2, 0.5), (14.0, 2, 16, 0.0), (-0.01, 2, 2, 0.0)],
)
def test_only_cores_that_are_needed_can_be_missing(others_cores, threads, cores, expected):
    assert _cpu_report.missing_share(others_cores, threads, cores) == pytest.approx(expected)


def test_a_busy_process_is_seen():
    before = _cpu_report.busy_seconds()
    if before is None:
        pytest.skip("needs /proc/stat")
    sum(range(10_000_000))
    assert _cpu_report.busy_seconds() > before


def test_the_rest_is_what_the_parts_leave():
    table = _cpu_report.parts_table({"layers: attention": 1.0, "loss: elementwise": 0.5, "step": 4.0})
    assert "| rest: stacks of the layer loop, page faults | 2.50 | 62% |" in table
    assert table.endswith("| step | 4.00 | 100% |")
