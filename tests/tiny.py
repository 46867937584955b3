"""Runs small enough to train in a test: a tokenizer, prepared buckets, an imported model, and configs over them.

`start` trains as `launch train` does, but compiles each distinct step once, with little code generation. That separate
compilations agree bit for bit is left to tests/train/test_processes.py, which runs the real command.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.data.written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl
from tests.helpers import QUICK, unpad_params
from tlite_jax.checkpoint import Checkpoint, open_params, restore_optimizer, restore_params, save_model
from tlite_jax.config import MeshConfig, ModelConfig, RunConfig
from tlite_jax.config_files import override, parse
from tlite_jax.data.prepare import prepare
from tlite_jax.model.decoder import init_params, param_specs
from tlite_jax.sharding import make_mesh
from tlite_jax.telemetry.evaluated import Evaluated
from tlite_jax.telemetry.metrics import read_jsonl
from tlite_jax.train import loop, step
from tlite_jax.train.run import Run, open_run
from tlite_jax.train.spike_rewind import train_to_the_end

VOCAB_SIZE, LENGTH, BATCH_SIZE, STEPS = 307, 16, 24, 6
# 307, 20 and 30 do not divide over 8 shards: another mesh has another padding.
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 20,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


@functools.cache
def data() -> Path:
    """A directory with `tokenizer`, `buckets`, `documents` and `imported`; made once, removed when the tests end."""
    directory = Path(tempfile.mkdtemp(prefix="tlite-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write_tokenizer(directory / "tokenizer")
    (directory / "documents").mkdir()
    for name, sentences in (("ru", RUSSIAN), ("en", ENGLISH)):
        records = [{"text": text} for text in make_texts(sentences, 40, seed=3, longest=4)]
        write_jsonl(directory / "documents" / f"{name}.jsonl", records)
    prepare(parse(RunConfig, values(directory, directory / "unused"), "test"), directory / "tokenizer")
    write_imported(directory / "imported", directory / "tokenizer")
    return directory


def write_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer of 300 ids, with bos and eos."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*RUSSIAN, *ENGLISH], trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(roles))
    return directory


def write_imported(run: Path, tokenizer: Path, **model: Any) -> Path:
    """A model as `import` leaves it: step 0, no optimizer."""
    config = ModelConfig(**{**MODEL, **model})
    save_model(run, init_params(config, seed=5), config, weights_dtype="bfloat16", origin="a test")
    shutil.copytree(tokenizer, run / "tokenizer")
    return run


def values(directory: Path, output: Path) -> dict[str, Any]:
    """A config as YAML gives it, over the files of `directory`."""
    sources = [
        {"name": name, "paths": [str(directory / "documents" / f"{name}.jsonl")], "labels": {"language": name}}
        for name in ("ru", "en")
    ]
    return {
        "output": str(output),
        "seed": 1,
        "model": dict(MODEL),
        "data": {
            "buckets": str(directory / "buckets"),
            "tokenizer": str(directory / "tokenizer"),
            "sequence_length": LENGTH,
            "prepare": {"sources": sources, "held_out": {"fraction": 0.1}, "num_workers": 1},
            "mixture": {
                "groups": [{"select": {"language": "ru"}, "share": 0.75}, {"select": {"language": "en"}, "share": 0.25}]
            },
        },
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 1e-3},
        "schedule": {"name": "cosine_with_warmup", "warmup_steps": 2, "final_lr_fraction": 0.1},
        "train": {"steps": STEPS, "batch_size": BATCH_SIZE},
        "execution": {"compute_dtype": "float32", "remat": "none", "loss_chunk_tokens": 64},
        "checkpoint": {"every": 100, "keep_latest": 9},
        "telemetry": {"console": False, "tensorboard": False},
    }


def config(output: Path, *overrides: str) -> RunConfig:
    """A run's config with dotted overrides, as from the command line."""
    return override(parse(RunConfig, values(data(), output), "test"), overrides)


def from_imported() -> list[str]:
    """Overrides that start from the imported model: no random weights to compile."""
    words = [f"init_from.path={data() / 'imported'}", "init_from.optimizer=reset", "init_from.schedule=reset"]
    return ["model=null", *words]


# With these, a run of some steps is the begin of one with more, up to 8.
LONGER = (f"data.mixture.tokens={8 * BATCH_SIZE * LENGTH}", "schedule.name=constant_with_warmup")


def write_config(path: Path, output: Path, **changes: Any) -> Path:
    """The config as a YAML file; JSON is YAML."""
    path.write_text(json.dumps({**values(data(), output), **changes}), encoding="utf-8")
    return path


def mesh(replica: int = 1, fsdp: int = 8) -> jax.sharding.Mesh:
    """A mesh of the first devices."""
    return make_mesh(MeshConfig(replica=replica, fsdp=fsdp), jax.devices()[: replica * fsdp])


def start(
    config: RunConfig,
    on: jax.sharding.Mesh | None = None,
    *,
    evaluate: loop.Evaluation | None = None,
    allow_change: bool = False,
    around_step: Callable[[step.Step], step.Step] | None = None,
) -> loop.Result:
    """Starts a run or goes on with it, as the command does."""
    on = on or mesh()

    def train_once(run: Run) -> loop.Result:
        return loop.train(run, on, evaluate=evaluate, around_step=around_step)

    with mock.patch.object(loop, "make_step", make_quick_step):
        return train_to_the_end(train_once, open_run(config, mesh=on, allow_change=allow_change), on)


class Evaluation:
    """An evaluation as the loop knows it: calls a function of the step and the parameters, which gives an Evaluated."""

    stopped = None

    def __init__(self, function: Callable[[int, Any], Evaluated], every: int, total_steps: int = STEPS):
        self._function, self._every, self._total_steps = function, every, total_steps
        self._done: set[int] = set()

    def due(self, step: int) -> bool:
        return step not in self._done and (step % self._every == 0 or step == self._total_steps)

    def __call__(self, step: int, params: Any) -> Evaluated:
        self._done.add(step)
        return self._function(step, params)

    def kept(self, steps: Collection[int]) -> Collection[int]:
        return ()


_compiled: dict[Any, Callable] = {}


def make_quick_step(model, optimizer, execution, mesh, *, schedule, document_masking, norms):
    """`make_step`, compiled once for equal arguments, with little code generation."""
    rates = tuple(float(schedule(number)) for number in range(30))
    key = (str((model, optimizer, execution)), mesh, rates, document_masking, norms)
    options = {"schedule": schedule, "document_masking": document_masking, "norms": norms}
    real = step.make_step(model, optimizer, execution, mesh, **options)

    def quick_step(state, batch):
        if key not in _compiled:
            _compiled[key] = real.lower(state, batch).compile(compiler_options=QUICK)
        return _compiled[key](state, batch)

    return quick_step


def state(checkpoint: Checkpoint, on: jax.sharding.Mesh | None = None) -> dict[str, np.ndarray]:
    """Every parameter and moment, logical shapes, by its name."""
    on, specs = on or mesh(), param_specs(checkpoint.meta.model)
    adam = restore_optimizer(checkpoint, on)
    trees = {
        "params": unpad_params(restore_params(checkpoint, on), specs),
        "mu": unpad_params(adam.mu, specs),
        "nu": unpad_params(adam.nu, specs),
        "num_updates": adam.num_updates,
    }
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(trees)}


def params_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Nested dict of the parameters in memory, logical shapes, stored dtypes."""
    return jax.tree.map(np.asarray, open_params(checkpoint))


def assert_same_state(found: Checkpoint, expected: Checkpoint, on: jax.sharding.Mesh | None = None) -> None:
    """Bit for bit; they may have been saved on, and are read into, different meshes."""
    found_state, expected_state = state(found, on), state(expected)
    assert found_state.keys() == expected_state.keys()
    differ = [name for name, x in expected_state.items() if found_state[name].tobytes() != x.tobytes()]
    assert not differ


def metrics(run: Path, name: str = "loss") -> dict[int, float]:
    """Step -> value, from metrics.jsonl."""
    return {line["step"]: line[name] for line in read_jsonl(run / "metrics.jsonl") if name in line}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative name, to see that nothing was written or harmed."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
    }
