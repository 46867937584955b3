"""How much slower preparing a shard is than the bare tokenizer: reading, checking, hashing and writing included."""

import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
# How Llama 3 cuts text before it merges bytes.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BATCH_CHARACTERS = 1 << 18


def measure(*, megabytes: float, repeats: int, tokenizer: Path | None = None) -> dict[str, Any]:
    """Tokenises the same documents in turns, on one core.

    Args:
      megabytes: UTF-8 text, two thirds of it Russian, documents of about 2 KB.
      repeats: turns.
      tokenizer: a Hugging Face tokenizer directory; None trains one of 8,000 tokens on the repository's sample.

    Returns:
      contender -> MB of text a second of processor time and of wall clock, medians; `ratio`: median over the turns of
      the bare tokenizer's processor time divided by ours (1 is no overhead, 0.9 is 10%); `tokens_equal`.
    """
    # The tokenizers library reads this when it first encodes: the core is what is measured, not the machine.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    previous = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(previous)})
    try:
        with tempfile.TemporaryDirectory() as name:
            return _measure(Path(name), int(megabytes * 1e6), repeats, tokenizer)
    finally:
        os.sched_setaffinity(0, previous)


def _measure(directory: Path, size: int, repeats: int, tokenizer: Path | None) -> dict[str, Any]:
    from tlite_jax.config import SourceConfig
    from tlite_jax.data.documents import make_shards
    from tlite_jax.data.inputs import find_files
    from tlite_jax.data.labels.labelling import Labelling
    from tlite_jax.data.shards import ShardSettings, encoder_for, open_shard, tokenize_shard
    from tlite_jax.data.tokenize import load_tokenizer

    texts = _documents(size)
    path = directory / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    loaded = load_tokenizer(tokenizer or _train(directory / "tokenizer"), None, None)
    source = SourceConfig(name="bench", paths=(str(path),))
    (shard,) = make_shards(source, find_files(source), 1 << 40)
    settings = ShardSettings(directory / "shards", loaded, ("source",), 10_000_000, None, None, Labelling(), None)
    encoder = encoder_for(shard, settings, {})
    bare = tokenizers.Tokenizer.from_str(loaded.definition)
    bare.encode_special_tokens = True
    batches = list(_batches(texts))

    def raw() -> int:
        return sum(len(e.ids) for batch in batches for e in bare.encode_batch_fast(batch, add_special_tokens=False))

    def raw_without_ids() -> int:
        return sum(len(bare.encode_batch_fast(batch, add_special_tokens=False)) for batch in batches)

    def ours() -> int:
        shutil.rmtree(settings.directory, ignore_errors=True)
        return int(open_shard(tokenize_shard(shard, settings, encoder)).tokens().size)

    contenders = {"encode_batch_fast": raw_without_ids, "encode_batch_fast and ids": raw, "whole shard": ours}
    return {**_in_turns(contenders, path.stat().st_size, repeats), "tokens_equal": raw() == ours()}


def _in_turns(contenders: dict[str, Callable[[], int]], size: int, repeats: int) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].append((time.process_time() - processor, time.perf_counter() - wall))
    result: dict[str, Any] = {}
    for name, found in times.items():
        processor, wall = (statistics.median(column) for column in zip(*found, strict=True))
        result[name] = {"core_mb_per_second": size / processor / 1e6, "wall_mb_per_second": size / wall / 1e6}
    bare, whole = times["encode_batch_fast"], times["whole shard"]
    result["ratio"] = statistics.median(one[0] / other[0] for one, other in zip(bare, whole, strict=True))
    return result


def _batches(texts: list[str]) -> list[list[str]]:
    result, batch, size = list[list[str]](), list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            result.append(batch)
            batch, size = [], 0
    return [*result, batch] if batch else result


def _documents(size: int) -> list[str]:
    """Sentences of the repository's sample in new orders, until there are `size` bytes."""
    chance, result, total = random.Random(0), list[str](), 0
    sentences = {name: _sample(name) for name in ("russian", "english", "code")}
    while total < size:
        name = chance.choice(("russian", "russian", "russian", "russian", "english", "code"))
        text, goal = "", chance.lognormvariate(7.2, 0.8)
        while len(text) < goal:
            text += chance.choice(sentences[name]) + " "
        result.append(text)
        total += len(text.encode())
    return result


def _sample(name: str) -> list[str]:
    lines = (ROOT / "tlite_jax" / "data" / "sample" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [part for line in lines for part in json.loads(line)["text"].split(". ") if part.strip()]


def _train(directory: Path) -> Path:
    """A byte-level BPE tokenizer with the cuts of Llama 3."""
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text for name in ("russian", "english", "code") for text in _sample(name)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


if __name__ == "__main__":
    print(json.dumps(measure(megabytes=5, repeats=5), indent=1))
