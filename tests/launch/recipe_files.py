"""A recipe small enough for a test: a tiny HF model, text, two stages, a GGUF type, and a gate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests import tiny

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STEPS = ("import", "prepare1", "stage1", "stage2", "eval-held-out", "export-hf", "export-gguf", "gate", "card")
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def environment() -> dict[str, str]:
    """Of its commands: one device, little code generation."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": QUICK, "HF_HUB_OFFLINE": "1"}


def write_recipe(directory: Path, **changes: Any) -> Path:
    """Everything that a recipe starts from; returns its file."""
    data = tiny.data()
    model = {name: value for name, value in tiny.MODEL.items() if name != "rope_theta"} | {"tie_word_embeddings": False}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**model, bos_token_id=0, eos_token_id=1)).save_pretrained(directory / "source")
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(directory / "source")
    for name in ("ru", "en"):
        (directory / f"{name}.jsonl").write_bytes((data / "documents" / f"{name}.jsonl").read_bytes())
    for number, source in ((1, "base"), (2, "stage1")):
        (directory / f"stage{number}.yaml").write_text(json.dumps(_stage(directory, number, source)), encoding="utf-8")
    recipe: dict[str, Any] = {
        "name": "Tiny-Russian",
        "output": str(directory / "out"),
        "base": {"source": str(directory / "source")},
        "stages": [{"config": str(directory / f"stage{number}.yaml")} for number in (1, 2)],
        "evaluate": [{"name": "held-out", "max_tokens": 500}],
        "export": {"types": ["F16", "Q8_0"]},
        "gate": {"windows": 8},
        "card": {"license": "apache-2.0", "base_model": "a-lab/tiny", "languages": ["ru", "en"]},
    }
    file = directory / "recipe.yaml"
    file.write_text(json.dumps({**recipe, **changes}), encoding="utf-8")
    return file


def _stage(directory: Path, number: int, source: str) -> dict[str, Any]:
    values = tiny.values(tiny.data(), directory / f"stage{number}")
    values["data"]["buckets"] = str(directory / "buckets")
    values["data"]["tokenizer"] = None
    if number == 1:
        for part in values["data"]["prepare"]["sources"]:
            part["paths"] = [str(directory / f"{part['name']}.jsonl")]
    else:
        values["data"]["prepare"] = None
    values["model"] = None
    values["init_from"] = {"path": str(directory / source), "optimizer": "reset", "schedule": "reset"}
    values["train"] = {"steps": 4, "batch_size": 4}
    values["optimizer"] = {"learning_rate": 1e-4, "weight_decay": 0.0}
    values["seed"] = number
    if number == 2:
        values["evaluation"] = {"every": 4, "batch_size": 4, "max_tokens": 300}
    return values


def recipe(*words: object) -> subprocess.Popen[str]:
    """Starts the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "recipe", *map(str, words)],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """Waits for it; returns what it printed."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def told(output: str) -> dict[str, str]:
    """Step -> what was said of it."""
    lines = [line.partition(": ") for line in output.splitlines()]
    return {name: said for name, _, said in lines if name in STEPS}
