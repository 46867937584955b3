"""The release gate as a user meets it: what is right passes, and each thing that is wrong is named."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launch import __main__ as launch_main
from launch.export import export_gguf_files
from launch.import_ import import_model
from launch.language_model import load_tokenizer
from tests import tiny
from tests.bridge.tiny import tiny_model, train_tokenizer
from tlite_jax.bridge.gguf_metadata import ReleaseFacts
from tlite_jax.checkpoint import find, save_model
from tlite_jax.config import MeshConfig
from tlite_jax.release import quantizations
from tlite_jax.release.files import find_exports
from tlite_jax.release.gate import Gate, Options
from tlite_jax.release.result import ReleaseResult, load
from tlite_jax.release.sample import own_text
from tlite_jax.sharding import make_mesh

ALL = (
    "exports",
    "weights finite",
    "files intact",
    "base round trip",
    "hf weights",
    "gguf weights",
    "token ids",
    "hf logits",
    "gguf f16",
    "quantizations",
    "generation",
    "forgetting",
)


def gate(*words: object) -> int:
    """Calls `python -m launch gate` in this process; returns the exit status."""
    before, sys.argv = sys.argv, ["launch", "gate", *map(str, words)]
    try:
        launch_main.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    backend = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>").save_pretrained(
        directory
    )


def another(run: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A run whose weights differ."""
    found = find(run)
    params = tiny.params_of(found)
    params = {name: np.array(part) if name != "blocks" else dict(part) for name, part in params.items()}
    change(params)
    shutil.copytree(run / "tokenizer", to / "tokenizer")
    save_model(to, params, found.meta.model, weights_dtype="bfloat16", origin=found.meta.origin)
    return to


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `source` (Hugging Face's), `run` (imported) and `out` (gated, with all files)."""
    directory = tmp_path_factory.mktemp("gate")
    tiny_model("plain", torch.bfloat16).save_pretrained(directory / "source")
    save_tokenizer(directory / "source", 600)
    import_model(str(directory / "source"), directory / "run")
    types = ("--type", "Q8_0", "--type", "Q4_0")
    assert gate(directory / "run", "--out", directory / "out", *types, "--windows", 2, "--name", "tiny") == 0
    return directory


def statuses(result: ReleaseResult) -> dict[str, str]:
    return {check.name: check.status for check in result.checks}


def test_a_sound_release_passes_every_check(place: Path) -> None:
    result = load(place / "out")
    assert result.passed
    assert statuses(result) == dict.fromkeys(ALL, "passed")
    assert result.base == str(place / "source")
    assert {path.name for path in (place / "out").iterdir()} == {"release.json", "hf", "gguf"}
    names = {file.path for file in result.files}
    assert {"hf/model.safetensors", "hf/SHA256SUMS", "gguf/tiny.F16.gguf", "gguf/tiny.Q4_0.gguf.sha256"} <= names
    table = result.quantizations
    assert table is not None
    assert [row.type for row in table.rows] == ["F16", "Q8_0", "Q4_0"]
    assert (table.base, table.context, table.num_tokens) == ("F16", 512, 2 * 255)
    f16, q8, q4 = table.rows
    assert f16.mean_kl == 0
    assert 0 < q8.mean_kl < q4.mean_kl
    assert q8.bits_per_weight > q4.bits_per_weight
    assert f16.perplexity == table.base_perplexity
    written = {text.source: text for text in result.generated}
    assert written.keys() == {"checkpoint", "tiny.F16.gguf"}


def test_each_thing_that_is_wrong_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of a weight, another tokenizer, and files of a checkpoint that is nearly the same."""
    shutil.copytree(place / "out" / "hf", tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    save_tokenizer(tmp_path / "hf", 500)

    def shift(params: dict[str, Any]) -> None:
        params["embedding"] = (params["embedding"].astype(np.float32) * 1.01).astype(params["embedding"].dtype)

    run = another(place / "run", tmp_path / "another", shift)
    export_gguf_files(run, tmp_path / "gguf", ["F16", "Q8_0"], ReleaseFacts("tiny"))
    capsys.readouterr()
    words = ("--exports", tmp_path / "hf", "--exports", tmp_path / "gguf", "--windows", 2, "--json")
    assert gate(place / "run", "--out", tmp_path / "out", *words) == 1
    said = capsys.readouterr()
    result = load(tmp_path / "out")
    assert json.loads(said.out) == result.model_dump(mode="json")
    failed = {name for name, status in statuses(result).items() if status == "failed"}
    assert failed == {"files intact", "hf weights", "gguf weights", "token ids", "gguf f16"}
    assert not result.passed
    assert f"not a release: {', '.join(name for name in ALL if name in failed)}" in said.err
    details = {check.name: " ".join(check.details) for check in result.checks}
    assert "1 values differ" in details["hf weights"]
    assert "tiny.Q8_0.gguf: token_embd.weight (Q8_0)" in details["gguf weights"]
    assert "transformers makes" in details["token ids"]
    assert "SHA-256" in details["files intact"]


def test_a_checkpoint_with_nan_fails_and_is_not_released(place: Path, tmp_path: Path) -> None:
    def spoil(params: dict[str, Any]) -> None:
        up = np.array(params["blocks"]["up"])
        up[1, 3, 5] = np.nan
        params["blocks"]["up"] = up

    run = another(place / "run", tmp_path / "run", spoil)
    words = ("--exports", place / "out" / "hf", "--windows", 2, "--allow-missing", "torch,gguf")
    assert gate(run, "--out", tmp_path / "out", *words) == 1
    found = statuses(load(tmp_path / "out"))
    assert found["weights finite"] == found["hf weights"] == found["generation"] == "failed"
    assert found["gguf weights"] == found["gguf f16"] == "not run"
    assert found["base round trip"] == "passed"
    assert gate(run, "--out", tmp_path / "made") == 1
    made = load(tmp_path / "made").named("exports")
    assert made is not None
    assert made.status == "failed"
    assert "blk.1.ffn_up.weight has NaN" in made.value


def test_bad_usage_is_refused_and_makes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("коротко")
    run, out = place / "run", tmp_path / "out"
    for words, message in {
        ("--dtype", "int8"): "--dtype int8: choose float32 or bfloat16",
        ("--type", "Q9"): "--type Q9: choose from",
        ("--allow-missing", "gpu"): "--allow-missing gpu: choose from torch, base, hf, gguf",
        ("--exports", str(tmp_path / "absent")): "does not exist",
        ("--exports", str(tmp_path)): "no Hugging Face directory and no .gguf file",
        ("--exports", str(place / "out"), "--type", "F16"): "--type is for a gate that exports by itself",
        ("--sample", str(tmp_path / "absent")): "cannot read --sample",
        ("--base", str(tmp_path / "absent")): "no checkpoint in",
        ("--most-kl", "Q4_0"): "--most-kl Q4_0: give TYPE=VALUE",
        ("--most-kl", "Q4_0=-1"): "--most-kl Q4_0=-1: give TYPE=VALUE",
        ("--most-kl", "Q9=1"): "--most-kl Q9=1: give TYPE=VALUE",
        ("--most-kl", "F16=1", "--most-kl", "F16=2"): "F16 is given twice",
        ("--type", "Q8_0", "--most-kl", "Q4_0=1"): "the release has no such file; it has F16, Q8_0",
        ("--step", "7"): "has no checkpoint of step 7",
    }.items():
        capsys.readouterr()
        assert gate(run, "--out", out, *words) == 2, words
        assert message in capsys.readouterr().err
    assert gate(run, "--out", tmp_path / "short.txt") == 2
    assert "short.txt is not a directory; choose another" in capsys.readouterr().err
    assert gate(run, "--out", place / "out") == 2
    assert "hf exists; check it with --exports" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_an_interrupted_gate_leaves_no_old_verdict(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Gate) -> ReleaseResult:
        raise KeyboardInterrupt

    shutil.copy(place / "out" / "release.json", tmp_path)
    monkeypatch.setattr(Gate, "run", interrupted)
    assert gate(place / "run", "--out", tmp_path, "--exports", place / "out") == 130
    assert not list(tmp_path.iterdir())


def checked(place: Path, exports: Path, out: Path, *names: str, **limits: float) -> ReleaseResult:
    """The checks of these names, with limits of the mean KL."""
    checks = Gate(
        find(place / "run"),
        find_exports([exports]),
        None,
        out,
        make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]),
        load_tokenizer,
        Options("float32", own_text(), "own", 1, frozenset(), limits),
    )
    chosen = {name: part for name, part in checks.parts().items() if name in names}
    checks.parts = lambda: chosen  # type: ignore[method-assign]
    return checks.run()


def test_fewer_bits_may_be_better_but_the_users_limits_hold(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped = {"Q8_0": 4.0, "Q4_0": 8.0}
    monkeypatch.setattr(quantizations, "bits_per_weight", lambda file: swapped.get(file.name.split(".")[1], 16.0))
    result = checked(place, place / "out", tmp_path, "quantizations")
    assert result.passed
    assert "Q4_0 (8.00 bits) predicts worse than Q8_0 (4.00)" in result.checks[0].details[0]
    result = checked(place, place / "out", tmp_path, "quantizations", Q4_0=1e-7)
    assert not result.passed
    assert "tiny.Q4_0.gguf: mean KL" in result.checks[0].details[0]
    assert "--most-kl Q4_0=1e-07" in result.checks[0].details[0]
    assert result.quantizations is not None


def test_a_damaged_checkpoint_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    file = max((tmp_path / "run" / "checkpoints").rglob("params/*/0*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert gate(tmp_path / "run", "--out", tmp_path / "out") == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predictions_that_are_not_finite_fail_the_table(place: Path, tmp_path: Path) -> None:
    """A file whose scales are damaged; and what a killed gate left is cleared."""
    damaged = tmp_path / "gguf" / "tiny.Q8_0.gguf"
    damaged.parent.mkdir()
    shutil.copy(place / "out" / "gguf" / "tiny.Q8_0.gguf", damaged)
    content = bytearray(damaged.read_bytes())
    content[-34:-32] = b"\x00\x7e"  # the last block of Q8_0: two bytes of scale, now NaN, and 32 of values
    damaged.write_bytes(content)
    (tmp_path / ".gate.old").mkdir()
    result = checked(place, damaged.parent, tmp_path, "files intact", "quantizations")
    assert statuses(result) == {"files intact": "failed", "quantizations": "failed"}
    assert "predictions" in " ".join(result.checks[1].details)
    assert result.quantizations is None
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]
