"""A Hugging Face directory opened by two real processes: each reads its devices' rows, and no other weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.bridge.tiny import train_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 300
# Sharded dims that eight devices do not divide, so that the last rows are padding.
MODEL = {
    "vocab_size": 4003,
    "hidden_size": 192,
    "intermediate_size": 500,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.8 million bfloat16 weights in several shards."""
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="1MB")
    backend = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def opened(source: Path, out: Path, *, processes: int, devices: int) -> list[dict[str, Any]]:
    """What each process has found."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    files = [out / f"{processes}-{number}.json" for number in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bridge.open_in_job", coordinator, str(processes), str(number), source, file],
            cwd=REPOSITORY,
            env=environment,
        )
        for number, file in enumerate(files)
    ]
    try:
        assert [process.wait(TIMEOUT) for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads(file.read_text()) for file in files]


def test_each_of_two_processes_reads_half_of_the_weights_and_all_have_the_same(source: Path, tmp_path: Path) -> None:
    both = opened(source, tmp_path, processes=2, devices=4)
    (alone,) = opened(source, tmp_path, processes=1, devices=8)
    assert both[0]["shards"] | both[1]["shards"] == alone["shards"]
    common = both[0]["shards"].keys() & both[1]["shards"].keys()
    assert all("norm" in name for name in common), common
    weights, norms = sizes(source)
    assert sum(num_bytes for _, _, num_bytes in alone["reads"]) == weights + norms
    first, second = ({tuple(read) for read in found["reads"]} for found in both)
    assert {read[0] for read in first} == {read[0] for read in second} == {path.name for path in shards_of(source)}
    assert first | second == {tuple(read) for read in alone["reads"]}
    for found in both:
        assert len(found["reads"]) == len({tuple(read) for read in found["reads"]})
        read = sum(num_bytes for _, _, num_bytes in found["reads"])
        assert read == pytest.approx(weights / 2 + norms, rel=0.01)
        # The kernel's own count: besides the weights, headers, tokenizer, and what Python imports.
        assert read <= found["system"]
    assert both[0]["system"] < alone["system"] - 0.4 * weights
    assert both[1]["system"] < alone["system"] - 0.4 * weights


def shards_of(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def sizes(source: Path) -> tuple[int, int]:
    """Bytes of matrices, and of norms, which every device has whole."""
    weights = norms = 0
    for path in shards_of(source):
        with safe_open(path, "pt") as file:
            for name in list(file.keys()):
                size = file.get_tensor(name).nbytes
                weights, norms = weights + size * ("norm" not in name), norms + size * ("norm" in name)
    return weights, norms
