"""Buckets of format 1 are read as what they are. `version_1/` was written by the program that wrote that format."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_buckets import PAD, read_everything, write_store

from tlite_jax.config import MixtureConfig
from tlite_jax.data.buckets import BucketStore, read_held_out
from tlite_jax.data.loader import RowSource
from tlite_jax.data.mixture import make_plan
from tlite_jax.data.row_format import FORMAT_VERSION
from tlite_jax.data.verify import verify_buckets
from tlite_jax.errors import UserError

WRITTEN = Path(__file__).parent / "version_1"
LENGTHS = {"ru": [9, 4, 30], "unseen": []}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN, tmp_path / "v1"))


def test_rows_are_those_of_the_present_format(store: Path, tmp_path: Path) -> None:
    old, new = BucketStore.open(store), BucketStore.open(write_store(tmp_path / "v2", LENGTHS))
    assert (old.manifest["format_version"], new.manifest["format_version"]) == (1, FORMAT_VERSION)
    batches = []
    for opened in (old, new):
        plan = make_plan(MixtureConfig(), opened.infos(), seed=1, sequence_length=8, rows=None)
        batches.append(RowSource(plan, opened, document_masking=True).read(np.arange(plan.total_rows)))
        assert opened.buckets["ru"].packing == "concatenate"
    for name, values in batches[0].items():
        assert np.array_equal(values, batches[1][name]), name
    bucket = old.buckets["ru"]
    assert bucket.num_tokens(5) == 43 % 8
    assert bucket.read_row(5).tolist() == [50, 51, 52, PAD, PAD, PAD, PAD, PAD]
    assert bucket.segment_ids(1).tolist() == [1, 2, 2, 2, 2, 3, 3, 3]
    assert [len(bucket.documents) for bucket in read_held_out(store)] == [2, 2]


def test_damage_is_refused_and_found(store: Path) -> None:
    assert not verify_buckets(store).damages
    for path in sorted(store.rglob("*")):
        if not path.is_file() or not path.stat().st_size:
            continue
        intact = path.read_bytes()
        for position in range(0, len(intact), 7):
            damaged = bytearray(intact)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(bytes(damaged))
            assert str(path.relative_to(store)) in [damage.file for damage in verify_buckets(store).damages]
            if path.name != "documents.bin" or path.parent.name != "unseen":  # which has no rows that would need it
                with pytest.raises(UserError):
                    read_everything(store)
        path.write_bytes(intact)
