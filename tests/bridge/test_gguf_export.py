"""GGUF export: types, bytes, metadata, tokenizer; against llama.cpp's recorded output and the `gguf` library."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from launch.export import export_gguf_files
from launch.import_ import import_model
from tests import tiny
from tests.bridge import llama_cpp_reference as reference
from tests.bridge.tiny import TEXTS, train_tokenizer
from tlite_jax import checkpoint
from tlite_jax.bridge import gguf_export
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.gguf_metadata import ReleaseFacts
from tlite_jax.bridge.gguf_quantize import encode
from tlite_jax.bridge.gguf_tokenizer import PROBES, tokenizer_to_gguf
from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.bridge.tokenizer import PIPELINES, pre_tokenizer_of, read_files
from tlite_jax.errors import UserError

SaveTiny = Callable[..., tuple[Path, LlamaForCausalLM]]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(reference.RECORDED.read_text())


@pytest.fixture(scope="module")
def made() -> tuple[Any, Any]:
    model = reference.made_model()
    return reference.made_params(model), model


@pytest.mark.parametrize("name", reference.MODELS)
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_every_tensor_gets_llama_cpps_type(name: str, kind: str, recorded: dict[str, Any]) -> None:
    plan = gguf_export.plan_tensors(reference.MODELS[name], kind)
    assert reference.types_in_brief((tensor.name, tensor.kind) for tensor in plan) == recorded["types"][name][kind]


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_bytes_are_llama_cpps(kind: str, made: tuple[Any, Any], recorded: dict[str, Any], tmp_path: Path) -> None:
    params, model = made
    path = reference.export(params, model, tmp_path / "x.gguf", kind)
    for tensor, (encoding, digest) in reference.contents(path).items():
        assert recorded["hashes"][tensor][encoding] == digest[:16], f"{tensor} in {encoding}"


def test_slices_do_not_show(made: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, model = made
    whole = reference.export(params, model, tmp_path / "whole.gguf", "Q4_0")
    monkeypatch.setattr(gguf_export, "SLICE_VALUES", 1)
    sizes = []

    class Source(ParamsSource):
        def read(self, name: str, rows: slice) -> np.ndarray:
            array = super().read(name, rows)
            sizes.append(array.size if array.ndim > 1 else 0)
            return array

    facts = ReleaseFacts("made")
    gguf_export.export_gguf(Source(params, model), model, tmp_path / "sliced.gguf", "Q4_0", {}, facts)
    assert max(sizes) <= 64 * 256  # one head's rows
    assert (tmp_path / "sliced.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F32", "F16", "BF16"])
def test_encodings_are_those_of_the_gguf_library(kind: str) -> None:
    rows = np.random.default_rng(1).normal(size=(64, 96)).astype(np.float32)
    rows[0], rows[1, 3], rows[2] = 0, 1e-40, -1.5
    expected = gguf.quantize(rows, gguf.GGMLQuantizationType[kind])
    assert encode(rows, kind, "x").tobytes() == expected.tobytes()


def test_a_file_of_ours_is_what_the_gguf_library_reads(made: tuple[Any, Any], tmp_path: Path) -> None:
    params, model = made
    facts = ReleaseFacts("My model", "apache-2.0", "org/base", ("ru", "en"), "0123456789abcdef", 7, "1.2")
    path = tmp_path / "x.gguf"
    said = []
    source = ParamsSource(params, model)
    digest = gguf_export.export_gguf(
        source, model, path, "Q8_0", {}, facts, report=lambda done, total: said.append((done, total))
    )
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "My model",
        "general.license": "apache-2.0",
        "general.languages": ["ru", "en"],
        "general.size_label": "5.9M",
        "general.file_type": 7,
        "general.base_model.count": 1,
        "general.base_model.0.name": "base",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base",
        "llama.attention.head_count_kv": 1,
        "tlite_jax.recipe_hash": "0123456789abcdef",
        "tlite_jax.step": 7,
    }
    assert expected.items() <= {key: values.get(key) for key in expected}.items()
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    assert said[-1][0] == said[-1][1] == path.stat().st_size - reader.data_offset


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["tied_gqa", "scaled_bias", "plain"])
def test_floats_come_back_as_they_were(name: str, kind: str, save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny(name)
    import_model(str(source), tmp_path / "run")
    (path,) = export_gguf_files(tmp_path / "run", tmp_path / "out", [kind], ReleaseFacts("tiny"))
    before, after = checkpoint.find(tmp_path / "run"), import_gguf(path)
    assert after.model == before.meta.model
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": "bfloat16"}[kind]
    ours, theirs = tiny.params_of(before), after.params
    flat = {"embedding": ours["embedding"], "final_norm": ours["final_norm"], **ours["blocks"]}
    back = {"embedding": theirs["embedding"], "final_norm": theirs["final_norm"], **theirs["blocks"]}
    assert flat.keys() == back.keys()
    for key, array in flat.items():
        stored = np.float32 if "norm" in key or "bias" in key else dtype
        assert np.array_equal(back[key], array.astype(stored).astype(back[key].dtype)), key
    kept = AutoTokenizer.from_pretrained(source)
    (tmp_path / "tokenizer").mkdir()
    for file, content in after.tokenizer.items():
        (tmp_path / "tokenizer" / file).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in TEXTS:
        assert again(text)["input_ids"] == kept(text)["input_ids"]
    assert again.chat_template == kept.chat_template
    assert again.special_tokens_map == kept.special_tokens_map


def test_the_command_writes_files_and_their_hashes(save_tiny: SaveTiny, tmp_path: Path) -> None:
    source, _ = save_tiny("plain")
    import_model(str(source), tmp_path / "run")
    facts = ReleaseFacts("Мой tiny")
    files = export_gguf_files(tmp_path / "run", tmp_path / "out", ["Q8_0", "F16", "Q8_0"], facts)
    assert [file.name for file in files] == ["Мой tiny.Q8_0.gguf", "Мой tiny.F16.gguf"]
    for file in files:
        line = f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        assert file.with_name(f"{file.name}.sha256").read_text() == line
    with pytest.raises(UserError, match=r"F16\.gguf exists"):
        export_gguf_files(tmp_path / "run", tmp_path / "out", ["F32", "F16"], facts)
    again = export_gguf_files(tmp_path / "run", tmp_path / "again", ["Q8_0"], facts)
    assert again[0].read_bytes() == files[0].read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize(("types", "words"), [([], "--type is missing"), (["Q4_K_M", "Q4_K"], "--type Q4_K: choose")])
def test_unknown_types_are_refused(types: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        export_gguf_files(tmp_path / "run", tmp_path / "out", types, ReleaseFacts("x"))


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a\nb"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be part of a file's name"):
        ReleaseFacts(name)
    with pytest.raises(UserError, match="language 'Russian'"):
        ReleaseFacts("x", languages=("Russian",))


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (np.nan, "F32", "blk.3.attn_k.weight has NaN or infinite values"),
        (np.inf, "Q4_K_M", "blk.3.attn_k.weight has NaN or infinite values"),
        (7e4, "F16", "blk.3.attn_k.weight has values up to 70000, which F16 cannot hold"),
        (-7e4, "Q4_0", "which Q4_0 cannot hold"),
    ],
)
def test_values_that_no_reader_could_use_leave_no_file(
    value: float, kind: str, words: str, made: tuple[Any, Any], tmp_path: Path
) -> None:
    params, model = made
    blocks = params["blocks"] | {"key": params["blocks"]["key"].copy()}
    blocks["key"][3, 5, 7] = value
    with pytest.raises(UserError, match=words):
        reference.export(params | {"blocks": blocks}, model, tmp_path / "x.gguf", kind)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(made: tuple[Any, Any], tmp_path: Path) -> None:
    params, model = made

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference.export(params, model, tmp_path / "x.gguf", "F16", report=interrupted)
    assert not list(tmp_path.iterdir())


def test_rounding_first_is_quantising_the_rounded_file(made: tuple[Any, Any], tmp_path: Path) -> None:
    params, model = made
    rounded = {name: array.astype("bfloat16") if name == "embedding" else array for name, array in params.items()}
    rounded["blocks"] = {
        name: array if "norm" in name else array.astype("bfloat16") for name, array in params["blocks"].items()
    }
    direct = reference.export(params, model, tmp_path / "direct.gguf", "Q8_0", round_to="bfloat16")
    through = reference.export(rounded, model, tmp_path / "through.gguf", "Q8_0")
    assert reference.contents(direct) == reference.contents(through)
    plain = reference.export(params, model, tmp_path / "plain.gguf", "Q8_0")
    assert reference.contents(direct) != reference.contents(plain)


def test_every_pipeline_is_told_from_the_others_by_the_probes() -> None:
    splits = [
        [[piece for piece, _ in pre_tokenizer_of(pre).pre_tokenize_str(text)] for text in PROBES] for pre in PIPELINES
    ]
    assert all(splits[i] != splits[j] for i in range(len(splits)) for j in range(i))


def files_of(backend: Tokenizer, directory: Path, **settings: Any) -> dict[str, bytes]:
    named = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **(named | settings)).save_pretrained(directory)
    return read_files(directory)


@pytest.mark.parametrize("pre", PIPELINES)
def test_the_pre_tokenizer_is_recognised_by_what_it_does(pre: str, tmp_path: Path) -> None:
    backend = train_tokenizer(pre_tokenizer_of(pre))
    if pre == "llama-bpe":
        backend.model.ignore_merges = True
    metadata = tokenizer_to_gguf(files_of(backend, tmp_path), 640, "x")
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.tokens"][620] == "[PAD620]"
    assert [metadata["tokenizer.ggml.token_type"][index] for index in (0, 2, 300, 620)] == [3, 3, 1, 5]
    ids = {key: value for key, value in metadata.items() if key.endswith("_token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
    }
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (False, False)


def test_bos_and_eos_are_added_as_the_tokenizer_adds_them(tmp_path: Path) -> None:
    backend = train_tokenizer(pre_tokenizer_of("gpt-2"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    metadata = tokenizer_to_gguf(files_of(backend, tmp_path), 600, "x")
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, True)


def spoiled(how: str) -> Tokenizer:
    backend = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if how == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif how == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif how == "lstrip":
        backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    elif how == "sep":
        template = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 2)])
        backend.post_processor = template
    elif how == "ignore_merges":
        vocabulary = json.loads(backend.to_str())
        vocabulary["model"]["vocab"]["ĠThequick"] = len(backend.get_vocab())
        vocabulary["model"]["ignore_merges"] = True
        vocabulary["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        vocabulary["pre_tokenizer"]["use_regex"] = True
        backend = Tokenizer.from_str(json.dumps(vocabulary))
    return backend


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("prefix space", "splits text as none of llama-bpe, smollm, gpt-2 does.*--pre-tokenizer"),
        ("normalizer", "GGUF cannot say all that tokenizer.json does"),
        ("lstrip", "GGUF cannot say all that tokenizer.json does: .*<mask>"),
        ("sep", r"puts \[2\] before and \[\] after a text"),
        ("ignore_merges", "Thequick"),
    ],
)
def test_what_gguf_cannot_say_is_refused(how: str, words: str, tmp_path: Path) -> None:
    files = files_of(spoiled(how), tmp_path)
    with pytest.raises(UserError, match=words):
        tokenizer_to_gguf(files, 640, "x")
    if how != "sep":
        assert tokenizer_to_gguf(files, 640, "x", "qwen2")["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "expected a JSON object"),
        (b"{}", "tokenizer.json cannot be read"),
        (b'{"model": {"type": "Unigram"}}', "tokenizer.json cannot be read"),
        (None, "no tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content: bytes | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tokenizer_to_gguf({} if content is None else {"tokenizer.json": content}, 640, "x")


def test_several_chat_templates_come_back(tmp_path: Path) -> None:
    files = files_of(train_tokenizer(pre_tokenizer_of("gpt-2")), tmp_path)
    settings = json.loads(files["tokenizer_config.json"])
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    files["tokenizer_config.json"] = json.dumps(settings | {"chat_template": templates}).encode()
    metadata = tokenizer_to_gguf(files, 600, "x")
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    from tlite_jax.bridge.tokenizer import tokenizer_from_gguf

    assert json.loads(tokenizer_from_gguf(metadata, "x")["tokenizer_config.json"])["chat_template"] == templates
