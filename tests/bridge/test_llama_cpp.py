"""Our GGUF files against llama.cpp itself: `make test-llama-cpp`.

Runs with TLITE_LLAMA_CPP=1 and llama-cpp-python, and with TLITE_SMOLLM2_GGUF on a real model as well. With
TLITE_RECORD=1 it writes what the tests that run everywhere compare with.
"""

import base64
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from launch.export import export_gguf_files
from launch.import_ import import_model
from tests.bridge import llama_cpp_reference as reference
from tests.bridge.tiny import TEXTS, train_tokenizer
from tlite_jax.bridge import gguf_file
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.gguf_export import export_gguf
from tlite_jax.bridge.gguf_metadata import ReleaseFacts
from tlite_jax.bridge.gguf_tokenizer import PROBES, tokenizer_to_gguf
from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.bridge.source import ParamsSource
from tlite_jax.bridge.tokenizer import pre_tokenizer_of, read_files, tokenizer_from_gguf
from tlite_jax.config import ModelConfig

if not os.environ.get("TLITE_LLAMA_CPP"):
    pytest.skip("ten minutes: make test-llama-cpp", allow_module_level=True)
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llama-cpp")
ROUNDINGS = {"F32": None, "F16": "float16", "BF16": "bfloat16"}
SMOLLM2 = os.environ.get("TLITE_SMOLLM2_GGUF")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    reference.quiet()


def compared(
    params: Mapping[str, Any], model: ModelConfig, directory: Path, source: str = "F32"
) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Yields every file type and what llama.cpp made of our `source` file; our direct export is the same."""
    base = reference.export(params, model, directory / "source.gguf", source)
    for kind in FILE_TYPES:
        ours = reference.export(params, model, directory / "ours.gguf", kind, round_to=ROUNDINGS[source])
        theirs = reference.llama_quantize(base, directory / "theirs.gguf", kind)
        expected, found = reference.contents(theirs), reference.contents(ours)
        assert list(found) == list(expected), f"{kind}: order"
        differing = {name: (found[name][0], expected[name][0]) for name in expected if found[name] != expected[name]}
        assert not differing, f"{kind}: {differing}"
        print(f"{kind:8}{len(expected):5} tensors, all identical, {ours.stat().st_size / 1e6:9.1f} MB")
        yield kind, expected
        ours.unlink()
        theirs.unlink()


@pytest.mark.parametrize("name", reference.MODELS)
def test_types_and_bytes_are_llama_cpps(name: str, tmp_path: Path) -> None:
    model = reference.MODELS[name]
    recorded = json.loads(reference.RECORDED.read_text()) if reference.RECORDED.exists() else {}
    types: dict[str, Any] = {}
    hashes: dict[str, dict[str, str]] = {}
    for kind, tensors in compared(reference.made_params(model), model, tmp_path):
        types[kind] = reference.types_in_brief((tensor, used) for tensor, (used, _) in tensors.items())
        for tensor, (used, digest) in tensors.items():
            assert hashes.setdefault(tensor, {}).setdefault(used, digest[:16]) == digest[:16]
    if os.environ.get("TLITE_RECORD"):
        recorded.setdefault("types", {})[name] = types
        recorded |= {"hashes": hashes} if name == reference.BYTES_OF else {}
        reference.RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    assert recorded["types"][name] == types
    if name == reference.BYTES_OF:
        assert recorded["hashes"] == hashes


@pytest.mark.parametrize("source", ["F16", "BF16"])
def test_bytes_are_llama_cpps_from_rounded_sources(source: str, tmp_path: Path) -> None:
    model = reference.MODELS["mha untied scaled bias"]
    assert len(list(compared(reference.made_params(model), model, tmp_path, source))) == len(FILE_TYPES)


def test_bytes_are_llama_cpps_for_strange_weights(tmp_path: Path) -> None:
    model = reference.made_model(num_hidden_layers=2)
    params = reference.made_params(model)
    for array in (params["embedding"], params["blocks"]["gate"][0], params["blocks"]["value"][1]):
        array[0], array[1], array[2] = 0, 1e-40, -3e-39
        array[3], array[4], array[5] = 1.0, -0.0, np.tile([60000.0, -60000.0], array.shape[-1] // 2)
        array[6, 17], array[7], array[8] = 30000.0, np.arange(array.shape[-1]), 6e-8
        array[9] = np.linspace(-1e-5, 1e-5, array.shape[-1])
    assert len(list(compared(params, model, tmp_path))) == len(FILE_TYPES)


@pytest.mark.skipif(not SMOLLM2, reason="TLITE_SMOLLM2_GGUF names no file")
def test_bytes_are_llama_cpps_for_smollm2(tmp_path: Path) -> None:
    imported = import_gguf(Path(str(SMOLLM2)))
    assert len(list(compared(imported.params, imported.model, tmp_path))) == len(FILE_TYPES)


@pytest.mark.parametrize("kind", [kind for kind in FILE_TYPES if kind not in ROUNDINGS])
def test_quantised_weights_are_undone_as_llama_cpp_undoes_them(kind: str, tmp_path: Path) -> None:
    model = reference.made_model(num_hidden_layers=8)
    source = reference.export(reference.made_params(model), model, tmp_path / "source.gguf", kind)
    _, ours = gguf_file.read(source)
    undone = reference.llama_quantize(source, tmp_path / "undone.gguf", "F32", requantize=True)
    _, theirs = gguf_file.read(undone)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert np.array_equal(np.asarray(ours[name].read(), np.float32), tensor.read()), name


def texts() -> list[str]:
    """Russian, English, code, emoji, whitespace, and any characters whatever."""
    result = [*TEXTS, *PROBES, "\n".join(TEXTS)]
    for file in sorted((resources.files("tlite_jax") / "data" / "sample").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".jsonl"):
            result += [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    random = np.random.default_rng(5)
    pools = [
        " \t\n\r",
        "'sStTlLrReEvVdDmM ",
        "0123456789½²٣Ⅷ .,",
        "abcABCяЯёЁщ ",
        "!?#$%()[]{}<>|/\\«»—…№ ",
        "😀👍🏽❤️日本한국 \u200d\u0301",
    ]
    for _ in range(2000):
        pool = "".join(pools[index] for index in random.integers(0, len(pools), 3))
        result.append("".join(pool[index] for index in random.integers(0, len(pool), 30)))
    return result


def llama3_tokenizer(directory: Path) -> Path:
    """Llama 3's tokenizer as its publisher ships it: from `llama-models`, under Llama 3's licence, never kept here."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama-models is not installed: make test-llama-cpp")
    vocabulary = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    names = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    names += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    names += [f"reserved_special_token_{index}" for index in range(2, 247)]

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
            lines = (line.split() for line in Path(path).read_bytes().splitlines())
            return {base64.b64decode(token): int(rank) for token, rank in lines}

    backend = Converter(str(vocabulary), extra_special_tokens=[f"<|{name}|>" for name in names]).converted()
    bos = ("<|begin_of_text|>", 128000)
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    backend.post_processor = processors.Sequence([backend.post_processor, template])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos[0], eos_token="<|end_of_text|>")
    fast.save_pretrained(directory)
    return directory


def smollm2_tokenizer(directory: Path) -> Path:
    if not SMOLLM2:
        pytest.skip("TLITE_SMOLLM2_GGUF names no file")
    metadata, _ = gguf_file.read(Path(SMOLLM2))
    for name, content in tokenizer_from_gguf(metadata, SMOLLM2).items():
        (directory / name).write_bytes(content)
    return directory


def tiny_tokenizer(directory: Path) -> Path:
    backend = train_tokenizer(pre_tokenizer_of("gpt-2"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("make", "pre", "vocab_size"),
    [(llama3_tokenizer, "llama-bpe", 128256), (smollm2_tokenizer, "smollm", 49152), (tiny_tokenizer, "gpt-2", 700)],
)
def test_token_ids_are_hugging_faces(make: Any, pre: str, vocab_size: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    files = read_files(make(tmp_path / "tokenizer"))
    tokenizer = tokenizer_to_gguf(files, vocab_size, "tokenizer")
    assert tokenizer["tokenizer.ggml.pre"] == pre
    model = reference.made_model(num_hidden_layers=1, vocab_size=vocab_size, hidden_size=32)
    source = ParamsSource(reference.made_params(model), model)
    export_gguf(source, model, tmp_path / "x.gguf", "Q8_0", tokenizer, ReleaseFacts("x"))
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    ours = Tokenizer.from_buffer(files["tokenizer.json"])
    special = [token.content for token in ours.get_added_tokens_decoder().values()][:20]
    cases = [*texts(), *(f"да{token}нет {token}\n{token}{token} 1" for token in special)]
    count = 0
    for text in cases:
        expected = ours.encode(text).ids
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == expected, repr(text)
        count += len(expected)
    print(f"{pre}: {count} ids of {len(cases)} texts are the same")


@pytest.mark.skipif(not SMOLLM2, reason="TLITE_SMOLLM2_GGUF names no file")
def test_llama_cpp_computes_the_same_from_every_precision(tmp_path: Path) -> None:
    """Limits: three times what was measured (mean KL 6e-6 and 3e-3; llama.cpp rounds activations to 8 bits in Q8_0)."""
    import_model(str(SMOLLM2), tmp_path / "run")
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital of France is"
    logits = {}
    for path in export_gguf_files(tmp_path / "run", tmp_path / "out", ["F32", "F16", "Q8_0"], ReleaseFacts("smol")):
        model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False, logits_all=True)
        ids = model.tokenize(text.encode(), add_bos=False, special=True)
        model.eval(ids)
        scores = model.scores[: len(ids)].astype(np.float64)
        logits[path.name.split(".")[1]] = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        assert model.detokenize([int(scores[-1].argmax())]) == b" Paris"
    for kind, limit in (("F16", 2e-5), ("Q8_0", 1e-2)):
        assert (np.exp(logits["F32"]) * (logits["F32"] - logits[kind])).sum(-1).mean() < limit
