"""Hugging Face directories, in and out, against transformers."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.bridge.tiny import CONFIGS, TEXTS, edit_json
from tlite_jax.bridge.assemble import Imported
from tlite_jax.bridge.hf import download, export_hf, import_hf, is_hub_id
from tlite_jax.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SaveTiny = Callable[..., tuple[Path, LlamaForCausalLM]]


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def export(imported: Imported, destination: Path, **options: Any) -> Path:
    """Exports with the tokenizer files that came with it, as `launch` does."""
    tokenizer = destination.parent / f"{destination.name}-tokenizer"
    tokenizer.mkdir()
    for name, content in imported.tokenizer.items():
        (tokenizer / name).write_bytes(content)
    values = {"weights_dtype": imported.weights_dtype, "tensor_dtypes": imported.tensor_dtypes} | options
    export_hf(imported.params, imported.model, destination, tokenizer, **values)
    return destination


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_round_trip_is_byte_identical(save_tiny: SaveTiny, tmp_path: Path, name: str, dtype: str, shard: str) -> None:
    source, _ = save_tiny(name, DTYPES[dtype], max_shard_size=shard)
    assert len(list(source.glob("*.safetensors"))) > 1 or shard == "10GB"
    imported = import_hf(source)
    assert (imported.weights_dtype, imported.tensor_dtypes, imported.notes) == (dtype, {}, ())
    back = export(imported, tmp_path / "back", max_shard_bytes=120_000)
    assert len(list(back.glob("*.safetensors"))) > 1
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert same_bytes(tensor, after[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_the_export_and_computes_the_same(save_tiny: SaveTiny, tmp_path: Path, name: str) -> None:
    source, model = save_tiny(name)
    back = export(import_hf(source), tmp_path / "back")
    ours, info = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer, theirs = AutoTokenizer.from_pretrained(back), AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        assert tokenizer(text) == theirs(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.special_tokens_map == theirs.special_tokens_map
    messages = [{"role": "user", "content": "Привет"}]
    assert tokenizer.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)
        continued = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (ours, model)]
    assert torch.equal(*continued)


def test_parameters_are_the_models_own_tensors_stacked(save_tiny: SaveTiny) -> None:
    source, model = save_tiny("scaled_bias", torch.bfloat16)
    params = import_hf(source).params
    layer = model.model.layers[2]
    for ours, theirs in {
        "attention_norm": layer.input_layernorm.weight,
        "query": layer.self_attn.q_proj.weight,
        "key": layer.self_attn.k_proj.weight,
        "value": layer.self_attn.v_proj.weight,
        "output": layer.self_attn.o_proj.weight,
        "query_bias": layer.self_attn.q_proj.bias,
        "output_bias": layer.self_attn.o_proj.bias,
        "mlp_norm": layer.post_attention_layernorm.weight,
        "gate": layer.mlp.gate_proj.weight,
        "up": layer.mlp.up_proj.weight,
        "down": layer.mlp.down_proj.weight,
    }.items():
        assert params["blocks"][ours].shape[0] == 3
        assert params["blocks"][ours][2].tobytes() == bytes(theirs.detach().view(torch.uint8).numpy()), ours
    for ours, theirs in {
        "embedding": model.model.embed_tokens,
        "final_norm": model.model.norm,
        "head": model.lm_head,
    }.items():
        assert np.asarray(params[ours]).tobytes() == bytes(theirs.weight.detach().view(torch.uint8).numpy()), ours


def test_mixed_dtypes_come_back_as_they_were(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain", torch.bfloat16)
    tensors = tensors_of(source)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[name] = tensors[name].float() + 1e-4
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"].half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    imported = import_hf(source)
    assert imported.weights_dtype == "bfloat16"
    assert imported.tensor_dtypes == {
        "model.layers.1.mlp.up_proj.weight": "float32",
        "model.layers.2.mlp.up_proj.weight": "float16",
        "model.norm.weight": "float32",
    }
    assert imported.params["blocks"]["up"].dtype == np.float32
    assert imported.params["blocks"]["gate"].dtype.name == "bfloat16"
    after = tensors_of(export(imported, tmp_path / "back"))
    assert all(same_bytes(tensor, after[name]) for name, tensor in tensors.items())
    one = tensors_of(export(imported, tmp_path / "one", weights_dtype="float32", tensor_dtypes={}))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}


def test_export_rounds_float32_masters_to_nearest_even(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, model = save_tiny("plain")
    after = tensors_of(export(import_hf(source), tmp_path / "back", weights_dtype="bfloat16"))
    for name, tensor in model.state_dict().items():
        assert same_bytes(tensor.bfloat16(), after[name])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_values_beyond_float16_are_not_turned_into_infinity(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj.weight has values beyond float16"):
        export(import_hf(source), tmp_path / "back", weights_dtype="float16")
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))


def test_all_wrong_tensors_are_named(save_tiny: SaveTiny) -> None:
    source, _ = save_tiny("plain")
    tensors = tensors_of(source)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(4)
    tensors["score.weight"] = torch.ones(4)
    tensors["model.norm.weight"] = torch.ones(65)
    tensors["model.layers.2.self_attn.k_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        import_hf(source)
    assert str(error.value) == (
        f"{source}: the tensors are not those its config describes; "
        "missing: model.layers.0.mlp.up_proj.weight, lm_head.weight; "
        "extra: model.layers.0.self_attn.q_norm.weight, score.weight; "
        "wrong shape: model.layers.2.self_attn.k_proj.weight is [32, 64] instead of [64, 64], "
        "model.norm.weight is [65] instead of [64]"
    )


def test_harmless_extras_are_accepted_and_said(save_tiny: SaveTiny) -> None:
    source, _ = save_tiny("tied_gqa")
    tensors = tensors_of(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert import_hf(source).notes == (
        "left out model.layers.*.self_attn.rotary_emb.inv_freq: recomputed from rope_theta",
        "left out lm_head.weight: a copy of the tied embedding",
    )
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, yet lm_head.weight differs"):
        import_hf(source)


def test_weights_of_other_dtypes_are_refused(save_tiny: SaveTiny) -> None:
    source, _ = save_tiny("plain")
    tensors = tensors_of(source)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight is float64; weights are bfloat16, float16, float32"):
        import_hf(source)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_reads_pytorch_pickles_of_tensors(save_tiny: SaveTiny, sharded: bool, zipped: bool) -> None:
    source, model = save_tiny("plain", torch.bfloat16)
    expected = jax.tree.map(np.asarray, import_hf(source).params)
    (source / "model.safetensors").unlink()
    state = model.state_dict()
    files = {"pytorch_model.bin": state}
    if sharded:
        names = list(state)
        files = {
            "pytorch_model-1.bin": {name: state[name] for name in names[:9]},
            "pytorch_model-2.bin": {name: state[name] for name in names[9:]},
        }
        weight_map = {name: file for file, part in files.items() for name in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in files.items():
        torch.save(part, source / file, _use_new_zipfile_serialization=zipped)
    imported = import_hf(source)
    assert imported.weights_dtype == "bfloat16"
    for name, array in expected["blocks"].items():
        assert np.asarray(imported.params["blocks"][name]).tobytes() == array.tobytes()
    assert np.asarray(imported.params["head"]).tobytes() == expected["head"].tobytes()


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


def test_pickles_that_are_more_than_tensors_are_refused(
    save_tiny: SaveTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, _ = save_tiny("plain")
    (source / "model.safetensors").unlink()
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        save({"model.norm.weight": _Harmful()}, source / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"torch.load\(weights_only=True\) refused it") as error:
            import_hf(source)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harmed").exists()
    torch.save({"model.norm.weight": [1, 2]}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a dictionary of tensors"):
        import_hf(source)


def test_a_pickle_without_torch_is_one_line(save_tiny: SaveTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = save_tiny("plain")
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"reading pytorch_model.bin needs 'torch': pip install 'tlite_jax\[torch\]'"):
        import_hf(source)


def test_a_directory_without_weights_or_config_says_so(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights; expected model.safetensors"):
        import_hf(source)
    with pytest.raises(UserError, match=r"'config.json' is missing"):
        import_hf(tmp_path)


def test_one_weights_file_is_read_with_the_config_beside_it(save_tiny: SaveTiny) -> None:
    source, _ = save_tiny("plain")
    expected = import_hf(source)
    head = np.asarray(expected.params["head"])
    (source / "model.safetensors").rename(source / "epoch3.safetensors")
    imported = import_hf(source / "epoch3.safetensors")
    assert (imported.model, imported.tokenizer) == (expected.model, expected.tokenizer)
    assert np.array_equal(imported.params["head"], head)


def test_a_snapshot_in_the_hubs_cache_is_read_through_its_links(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert import_hf(snapshot).tokenizer == import_hf(source).tokenizer
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(source / "config.json")
    with pytest.raises(UserError, match="is a link out of"):
        import_hf(snapshot)


def test_a_tokenizer_of_another_model_is_refused(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    imported = import_hf(source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"filler{index}": index for index in range(len(vocabulary), 641)}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = "the tokenizer's ids reach 640, the model's vocabulary has 640"
    with pytest.raises(UserError, match=words):
        import_hf(source)
    with pytest.raises(UserError, match=words):
        export_hf(imported.params, imported.model, tmp_path / "back", source, "float32")


def test_generation_config_and_token_ids_are_carried(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    edit_json(source / "generation_config.json", eos_token_id=[0, 2], temperature=0.6, do_sample=True)
    back = export(import_hf(source), tmp_path / "back")
    config = json.loads((back / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [0, 2])
    generation = AutoModelForCausalLM.from_pretrained(back).generation_config
    assert (generation.eos_token_id, generation.temperature) == ([0, 2], 0.6)
    (source / "generation_config.json").unlink()
    made = json.loads(import_hf(source).tokenizer["generation_config.json"])
    assert (made["bos_token_id"], made["eos_token_id"]) == (1, 0)


def test_the_exported_tokenizer_suits_transformers_4(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    edit_json(
        source / "tokenizer_config.json", extra_special_tokens=["<|pad|>"], auto_map={"AutoTokenizer": "evil.Tok"}
    )
    settings = json.loads((export(import_hf(source), tmp_path / "back") / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["additional_special_tokens"] == ["<|pad|>"]
    assert not settings.keys() & {"extra_special_tokens", "auto_map", "backend"}


def test_older_tokenizer_files_are_converted(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    expected = AutoTokenizer.from_pretrained(source)
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    edit_json(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    back = AutoTokenizer.from_pretrained(export(import_hf(source), tmp_path / "back"))
    for text in TEXTS:
        assert back(text)["input_ids"] == expected(text)["input_ids"]


def test_export_needs_a_free_place(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    imported = import_hf(source)
    before = sorted(source.iterdir())
    with pytest.raises(UserError, match="is not empty"):
        export_hf(imported.params, imported.model, source, None, "float32")
    assert sorted(source.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("meta-llama/Meta-Llama-3-8B", True), ("org/name.v2", True), ("name", False), ("../x", False), ("a/b/c", False)],
)
def test_recognises_hub_ids(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot fetch 'org/name' from the Hugging Face hub") as error:
        download("org/name")
    assert "\n" not in str(error.value)
