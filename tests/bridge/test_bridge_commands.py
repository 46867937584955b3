"""`import` and `export`: a model goes through a checkpoint unchanged; what cannot be done is said and harms nothing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import launch.export
import launch.import_
from launch.export import export_model
from launch.import_ import import_model
from tests import tiny as trained
from tests.bridge.gguf_writing import Kind, write_gguf
from tests.bridge.tiny import TEXTS, tiny_model, train_tokenizer
from tlite_jax import checkpoint
from tlite_jax.checkpoint.saver import saver
from tlite_jax.config import CheckpointConfig, ModelConfig
from tlite_jax.errors import UserError
from tlite_jax.train.state import abstract_state

SaveTiny = Callable[..., tuple[Path, LlamaForCausalLM]]


def run(command: Callable[..., None], *words: str | Path) -> str:
    """Runs one command as the command line does; returns what it printed."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_model_goes_through_a_checkpoint_unchanged(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("scaled_bias", torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.1.input_layernorm.weight"].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    said = run(launch.import_.main, source, tmp_path / "run")
    assert "reading" in said
    assert "note: weights are bfloat16, 1 tensors are not" in said
    found = checkpoint.find(tmp_path / "run")
    assert (found.step, found.meta.weights_dtype, found.meta.origin) == (0, "bfloat16", str(source))
    said = run(launch.export.main, tmp_path / "run", tmp_path / "back", "--max-shard-size", "100KB")
    assert "writing" in said
    shards = list((tmp_path / "back").glob("*.safetensors"))
    assert len(shards) > 1
    back = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "run" / "tokenizer", source))
    assert all(ours(text) == theirs(text) for text in TEXTS)
    run(launch.export.main, tmp_path / "run" / "checkpoints" / "0", tmp_path / "half", "--dtype", "float16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}


def test_a_gguf_file_is_known_by_its_content(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_gguf(tmp_path / "model.Q8_0", tiny_model("plain"), Kind.Q8_0, tokenizer)
    import_model(str(tmp_path / "model.Q8_0"), tmp_path / "run")
    assert checkpoint.find(tmp_path / "run").meta.weights_dtype == "bfloat16"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")("да")["input_ids"] == tokenizer.encode("да").ids
    )


def test_import_refuses_and_leaves_nothing(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    with pytest.raises(UserError, match="no such file or directory, and not a hub id"):
        import_model(str(tmp_path / "absent"), tmp_path / "run")
    with pytest.raises(UserError, match="--revision is for hub ids"):
        import_model(str(source), tmp_path / "run", revision="main")
    with pytest.raises(UserError, match="not a GGUF file"):
        import_model(str(source / "config.json"), tmp_path / "run")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        import_model(str(source), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain-source"]
    with pytest.raises(UserError, match="is not empty"):
        import_model(str(source), source)


def test_an_interrupted_import_leaves_nothing(
    save_tiny: SaveTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = save_tiny("plain")

    def interrupted(run: Path, *args: object, **kwargs: object) -> None:
        (run / "checkpoints" / "0").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_model(str(source), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain-source"]


def test_export_refuses_and_leaves_nothing(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    import_model(str(source), tmp_path / "run")
    back = tmp_path / "back"
    for words, message in {
        ("--format", "gguf"): "--type is missing: choose from F32, F16, BF16, Q8_0",
        ("--format", "gguf", "--type", "Q9"): "--type Q9: choose from",
        ("--format", "gguf", "--type", "F16", "--name", "a/b"): "cannot be part of a file's name",
        ("--type", "F16"): "--type is for --format gguf",
        ("--format", "onnx"): "--format onnx is not known",
        ("--dtype", "int8"): "--dtype int8 is not known; choose from bfloat16, float16, float32",
        ("--step", "3"): "has no checkpoint of step 3",
        ("--max-shard-size", "big"): "'big' is not a size",
    }.items():
        with pytest.raises(UserError, match=message):
            run(launch.export.main, tmp_path / "run", back, *words)
    with pytest.raises(UserError, match="no checkpoint in"):
        export_model(source, back)
    with pytest.raises(UserError, match="is not empty"):
        export_model(tmp_path / "run", source)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        export_model(tmp_path / "run", tmp_path / "file" / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "plain-source", "run"]


def test_help_shows_an_example() -> None:
    for command in (launch.import_.main, launch.export.main):
        assert "Example: python -m launch" in run(command, "--help")


def test_commands_are_light_until_they_run() -> None:
    heavy = {"jax", "torch", "transformers", "numpy"}
    code = f"import sys, launch.import_, launch.export; print(sorted({heavy} & {{*sys.modules}}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_an_export_does_not_read_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "trained"
    mesh = trained.mesh(1, 8)
    model = ModelConfig(**trained.MODEL)
    state = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype, device=leaf.sharding), abstract_state(model, mesh)
    )
    with saver(run_dir, CheckpointConfig(keep_latest=1)) as saving:
        saving.save(state, checkpoint.Meta(step=4, model=model, weights_dtype="bfloat16", origin="a test"))
    trained.write_tokenizer(run_dir / "tokenizer")
    found = checkpoint.find(run_dir)
    assert found.has_optimizer
    for file in (found.path / "optimizer").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    run(launch.export.main, run_dir, tmp_path / "hf")
    run(launch.export.main, run_dir, tmp_path / "gguf", "--format", "gguf", "--type", "F16")
    embedding = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert embedding.unique().tolist() == [0.5]
    flip = next(path for path in (found.path / "params").rglob("d/*") if path.stat().st_size)
    flip.write_bytes(bytes([flip.read_bytes()[0] ^ 1]) + flip.read_bytes()[1:])
    with pytest.raises(UserError, match="checkpoints/4 is damaged: params/"):
        run(launch.export.main, run_dir, tmp_path / "spoiled")
    assert not (tmp_path / "spoiled").exists()
    with pytest.raises(UserError, match="checkpoints/4 is damaged: params/"):
        run(launch.export.main, run_dir, tmp_path / "spoiled", "--format", "gguf", "--type", "F16")
    assert not (tmp_path / "spoiled").exists()
    with pytest.raises(ValueError, match="cannot be opened"):
        checkpoint.restore_optimizer(found, mesh)
