"""`prepare` with packed sources: whole documents, none lost, the long ones cut, full rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from written_texts import ENGLISH, RUSSIAN, make_texts, write_jsonl

from tlite_jax.config import RunConfig
from tlite_jax.data.buckets import BucketStore
from tlite_jax.data.prepare import prepare
from tlite_jax.data.verify import verify_buckets

Build = Callable[..., RunConfig]
LONG = " ".join(RUSSIAN * 6)


def test_whole_documents_fill_rows(run_config: Build, tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = [*make_texts(RUSSIAN, 300, 1, longest=3), LONG]
    path = write_jsonl(tmp_path / "ru.jsonl", [{"text": text} for text in texts])
    plain = write_jsonl(tmp_path / "en.jsonl", [{"text": text} for text in make_texts(ENGLISH, 30, 2)])
    sources = [
        {"name": "ru", "paths": [str(path)], "labels": {"style": "chat"}, "packing": "best_fit"},
        {"name": "en", "paths": [str(plain)], "labels": {"style": "chat"}},
    ]
    bucket_labels = {"bucket_labels": ["style"], "held_out": {"fraction": 0.0}}
    config = run_config(sources, prepare=bucket_labels, sequence_length=512)
    packed, concatenated = prepare(config, tokenizer_dir).buckets
    assert (packed.packing, concatenated.packing) == ("best_fit", "concatenate"), "one label, two packings, two buckets"
    assert packed.fill > 0.95
    assert packed.split_documents == 1
    assert packed.documents == len(texts)
    bucket = BucketStore.open(config.data.buckets).buckets[packed.name]
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pieces = []
    for row in range(bucket.manifest["rows"]):
        tokens, segments = bucket.read_row(row), bucket.segment_ids(row)
        assert np.all(segments[: bucket.num_tokens(row)] > 0)
        pieces += [tokens[segments == number] for number in range(1, segments.max() + 1)]
    whole = {
        tokenizer.decode(piece[1:-1].tolist(), skip_special_tokens=False)
        for piece in pieces
        if (piece[0], piece[-1]) == (0, 1)
    }
    assert whole == set(texts) - {LONG}
    parts = [piece for piece in pieces if (piece[0], piece[-1]) != (0, 1)]
    assert sum(len(piece) for piece in parts) == len(tokenizer.encode(LONG, add_special_tokens=False).ids) + 2
    assert sum(len(piece) for piece in pieces) == packed.tokens
    assert not verify_buckets(config.data.buckets).damages
