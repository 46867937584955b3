"""Processes that are killed cost what they were doing, and nothing else."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import RunConfig
from tlite_jax.config_files import save_config
from tlite_jax.data.prepare import prepare
from tlite_jax.data.workers import run_tasks
from tlite_jax.errors import UserError


def _start(directory: str) -> None:
    os.chdir(directory)


def _killed_the_first_time(number: int) -> int:
    """Dies on its first attempt at an even number; notes every attempt."""
    mark = Path(f"{number}.attempts")
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    if number % 2 == 0 and mark.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _always_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def _fails(number: int) -> int:
    raise UserError(f"task {number} cannot be done")


def run(work, directory: Path, count: int = 3) -> list[int]:
    return run_tasks(work, range(count), 2, lambda done, total: None, start=_start, start_arguments=(str(directory),))


def test_a_killed_process_costs_what_it_was_doing(tmp_path: Path) -> None:
    assert run(_killed_the_first_time, tmp_path) == [0, 1, 4]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()}.items() >= {"0.attempts": "xx"}.items()


def test_processes_that_are_always_killed_end_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"killed 3 times, out of memory perhaps: lower data\.prepare\.num_workers"):
        run(_always_killed, tmp_path, 1)


def _waits_for_ever(number: int) -> int:
    Path(f"{number}.partial").write_text(str(os.getpid()))
    Path(f"{number}.partial").rename(f"{number}.pid")
    signal.pause()
    return number


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    run_two = f"test_workers.run(test_workers._waits_for_ever, pathlib.Path({str(tmp_path)!r}), 2)"
    code = f"import pathlib, test_workers; {run_two}"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parents[1]), str(here.parent), str(here)])
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})
    try:
        _until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    _until(lambda: not any(_is_alive(pid) for pid in pids))


def _until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_error_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 0 cannot be done"):
        run(_fails, tmp_path, 1)


def test_buckets_are_the_same_wherever_preparing_was_killed(
    run_config: Callable[..., RunConfig], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL at writes, fsyncs and renames that a seed chooses; TLITE_KILLS asks for more of them."""
    texts = [*make_texts(RUSSIAN, 60, 0), *make_texts(ENGLISH, 40, 1)]
    records = [{"text": text, "style": f"s{number % 3}"} for number, text in enumerate([*texts, texts[3]])]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    source = {"name": "a", "paths": [str(path)], "label_fields": {"style": "style"}}
    todo = {"shard_bytes": 5000, "near_duplicates": {"threshold": 0.8}}
    prepare(run_config([source], prepare=todo, buckets=str(tmp_path / "reference")), tokenizer_dir)
    save_config(run_config([source], prepare=todo), tmp_path / "run.yaml")
    kills = os.environ.get("TLITE_KILLS", "12")
    command = [sys.executable, str(Path(__file__).with_name("killed_prepare.py"))]
    arguments = [str(tmp_path / "run.yaml"), str(tmp_path / "reference"), kills, os.environ.get("TLITE_SEED", "0")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    phases = ast.literal_eval(done.stdout)
    assert phases["before"] > int(kills) // 2
