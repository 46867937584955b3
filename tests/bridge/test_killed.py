"""Killed in the middle, an import or export leaves nothing that looks whole, and nothing at all once run again."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.export import export_gguf_files, export_model
from launch.import_ import import_model
from tlite_jax.bridge.files import new_directory, new_file
from tlite_jax.bridge.gguf_metadata import ReleaseFacts

# Kills itself, as `kill -9` would, when it says that bytes were written and there are more to come.
CHILD = """
import contextlib, os, signal, sys
from pathlib import Path
from launch import export, import_
from tlite_jax.bridge.gguf_metadata import ReleaseFacts

def report(done, total):
    if 0 < done < total:
        os.kill(os.getpid(), signal.SIGKILL)

byte_progress = lambda label: contextlib.nullcontext(report)
import_.byte_progress = export.byte_progress = byte_progress
{call}
"""
CALLS = {
    "run": "import_.import_model({source!r}, Path({target!r}))",
    "back": "export.export_model(Path({source!r}), Path({target!r}))",
    "gguf": "export.export_gguf_files(Path({source!r}), Path({target!r}), ['F16'], ReleaseFacts('m'))",
}


def test_a_killed_import_or_export_leaves_nothing_that_looks_whole(save_tiny: Any, tmp_path: Path) -> None:
    source, _ = save_tiny("plain", torch.bfloat16)
    import_model(str(source), tmp_path / "whole")
    sources = {"run": source, "back": tmp_path / "whole", "gguf": tmp_path / "whole"}
    children = []
    for target, call in CALLS.items():
        code = CHILD.format(call=call.format(source=str(sources[target]), target=str(tmp_path / target)))
        children.append(subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE))
    for child in children:
        _, error = child.communicate()
        assert child.returncode == -signal.SIGKILL, error.decode()[-2000:]
    left = [path for path in tmp_path.rglob("*.partial-*") if path.name.startswith(".")]
    assert len(left) == 3
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "back").exists()
    assert list((tmp_path / "gguf").glob("m.F16.gguf*")) == []
    import_model(str(source), tmp_path / "run")
    export_model(tmp_path / "whole", tmp_path / "back")
    export_gguf_files(tmp_path / "whole", tmp_path / "gguf", ["F16"], ReleaseFacts("m"))
    assert [path for path in left if path.exists()] == []
    back, sent = (load_file(directory / "model.safetensors") for directory in (tmp_path / "back", source))
    assert all(torch.equal(back[name], tensor) for name, tensor in sent.items())


@pytest.mark.parametrize("new", [new_directory, new_file])
def test_what_another_process_is_writing_is_left_alone(new: Any, tmp_path: Path) -> None:
    with new(tmp_path / "x") as first:
        second = new(tmp_path / "x")
        second.__enter__()
        assert first.exists()
        second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("new", [new_directory, new_file])
def test_a_file_system_without_locks_is_written_to_all_the_same(
    new: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(os.strerror(37))

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / ".x.partial-left").mkdir()  # nobody can tell whether it is in use
    with new(tmp_path / "x"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.partial-left", "x"]
