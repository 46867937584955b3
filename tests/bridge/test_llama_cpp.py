"""Our GGUF files against llama.cpp itself: `make test-llama-cpp`.

Needs llama-cpp-python, and with TLITE_SMOLLM2_GGUF a real model as well. With TLITE_RECORD=1 it writes what the tests
that run everywhere compare with.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bridge import llama_cpp_reference as reference
from tlite_jax.bridge.gguf import import_gguf
from tlite_jax.bridge.gguf_types import FILE_TYPES
from tlite_jax.config import ModelConfig

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
