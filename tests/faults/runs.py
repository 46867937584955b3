"""A tiny real training run that can be started hundreds of times: everything is imported once, each start is a fork.

The parent never initialises jax; a child does, opens the run as `launch train` does, and trains it on two devices.
Compiled programs come from jax's cache on disk, which the undisturbed run fills.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

from tests import tiny
from tests.data.written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl
from tlite_jax.checkpoint import find
from tlite_jax.config import RunConfig
from tlite_jax.config_files import parse
from tlite_jax.data.prepare import prepare
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.train.loop import train
from tlite_jax.train.run import open_run

DEVICES, STEPS, SAVE_EVERY = 2, 16, 2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def make_data(directory: Path) -> Path:
    """Tokenizer, documents, buckets and an imported model, made in a child."""

    def make() -> None:
        directory.mkdir()
        tokenizer = tiny.write_tokenizer(directory / "tokenizer")
        (directory / "documents").mkdir()
        for name, sentences in (("ru", RUSSIAN), ("en", ENGLISH)):
            records = [{"text": text} for text in make_texts(sentences, 40, seed=3, longest=4)]
            write_jsonl(directory / "documents" / f"{name}.jsonl", records)
        prepare(parse(RunConfig, tiny.values(directory, directory / "unused"), "test"), tokenizer)
        tiny.write_imported(directory / "imported", tokenizer)

    status = Child(make, directory.with_name("data.log")).wait()
    assert status == 0, directory.with_name("data.log").read_text()
    return directory


def config(data: Path, output: Path, cache: Path, **changes: Any) -> RunConfig:
    """The run's config; every second step is saved."""
    values = tiny.values(data, output)
    values |= {
        "model": None,
        "init_from": {"path": str(data / "imported"), "optimizer": "reset", "schedule": "reset"},
        "train": {"steps": STEPS, "batch_size": tiny.BATCH_SIZE},
        "checkpoint": {"every": SAVE_EVERY, "keep_latest": 3},
        "compilation_cache": str(cache),
    }
    values["data"]["mixture"]["tokens"] = STEPS * tiny.BATCH_SIZE * tiny.LENGTH
    return parse(RunConfig, values | changes, "test")


def train_to_the_end(run: RunConfig, **options: Any) -> int:
    """In a child: starts a run or goes on with it, and leaves `outcome.json` beside it; returns the last step."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_compilation_cache_dir", str(run.compilation_cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh = tiny.mesh(1, DEVICES)
    result = train(open_run(run, mesh=mesh), mesh, **options)
    if result.signal is None:
        run.output.with_suffix(".json").write_text(json.dumps(outcome(run.output, mesh)))
    return result.step


def outcome(run: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What must be equal bit for bit: every loss, the last state as it lies on disk, and the rows read."""
    last = find(run)
    hashed = hashlib.sha256()
    for name, array in tiny.state(last, mesh).items():
        hashed.update(name.encode() + array.tobytes())
    lines = read_jsonl(run / "metrics.jsonl")
    losses = [(line["step"], float(line["loss"]).hex()) for line in lines if "loss" in line]
    meta = last.meta
    rows = {"consumed": meta.rows_consumed, "ledger": meta.ledger, "skipped": meta.skipped}
    return {"step": last.step, "state": hashed.hexdigest(), "losses": losses, "rows": rows}


class Child:
    """A forked process that calls a function, its output in a file; it ends when this process does, however it ends.

    Attributes:
      pid: of the process.
      log: where it writes.
    """

    def __init__(self, work: Callable[[], Any], log: Path) -> None:
        self.log = log
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                work()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, if it is there still."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self) -> int:
        """Waits for its end and returns its exit status."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status


def undisturbed(data: Path, scratch: Path) -> dict[str, Any]:
    """The outcome of a run that nothing happens to; its compiled programs are kept in `scratch/cache`."""
    run = config(data, scratch / "undisturbed", scratch / "cache")
    # A run that is gone on with compiles what restores a state, too.
    shutil.copytree(data / "tokenizer", scratch / "unused", dirs_exist_ok=True)
    child = Child(lambda: train_to_the_end(run), scratch / "undisturbed.log")
    assert child.wait() == 0, child.log.read_text()
    return json.loads((scratch / "undisturbed.json").read_text())
