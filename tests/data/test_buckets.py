"""What is written is read back; what was changed since is refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlite_jax.data.bucket_writer import BucketWriter
from tlite_jax.data.buckets import Bucket, BucketStore, read_held_out
from tlite_jax.data.files import read_json, write_json
from tlite_jax.data.row_format import FORMAT_VERSION
from tlite_jax.data.verify import verify_buckets
from tlite_jax.errors import UserError

PAD = 3


def write_bucket(parent: Path, name: str, lengths: list[int], *, sequence_length: int, held: int = 0) -> str:
    """Documents whose tokens count upwards, so that every token tells its place."""
    writer = BucketWriter(parent, name, sequence_length=sequence_length, pad_id=PAD)
    first = 10
    for length in lengths:
        writer.append(np.arange(first, first + length, dtype=np.uint32), np.array([length]), 2 * length)
        first += length
    for number in range(held):
        writer.append_held_out(np.arange(number + 1, dtype=np.uint32), 100 + number)
    return writer.close({"language": name}, never_trained=not lengths)


def write_store(directory: Path, buckets: dict[str, list[int]], sequence_length: int = 8, held: int = 2) -> Path:
    directory.mkdir(exist_ok=True)
    digests = {
        name: write_bucket(directory, name, lengths, sequence_length=sequence_length, held=held)
        for name, lengths in buckets.items()
    }
    values = {"format_version": FORMAT_VERSION, "sequence_length": sequence_length, "buckets": digests}
    write_json(directory / "manifest.json", values)
    return directory


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), sequence_length=st.integers(1, 33))
def test_rows_hold_every_token_once(lengths: list[int], sequence_length: int, tmp_path_factory) -> None:
    parent = tmp_path_factory.mktemp("buckets")
    write_bucket(parent, "b", lengths, sequence_length=sequence_length)
    bucket = Bucket(parent / "b", read_json(parent / "b" / "manifest.json"))
    total = sum(lengths)
    rows = [bucket.read_row(row) for row in range(bucket.manifest["rows"])]
    assert len(rows) == -(-total // sequence_length)
    stream = np.concatenate(rows)
    assert stream[:total].tolist() == list(range(10, 10 + total))
    assert np.all(stream[total:] == PAD)
    assert sum(bucket.num_tokens(row) for row in range(len(rows))) == total
    assert bucket.manifest["text_bytes"] == 2 * total
    assert bucket.manifest["max_token_id"] == 9 + total
    # Segments: a plain restatement, token by token.
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(len(rows)):
        owners = owner[row * sequence_length : (row + 1) * sequence_length]
        expected = np.zeros(sequence_length, int)
        expected[: owners.size] = owners - owners[0] + 1
        assert bucket.segment_ids(row).tolist() == expected.tolist()


def test_long_appends_equal_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlite_jax.data.bucket_writer._FLUSH_TOKENS", 16)
    lengths = [5, 70, 1, 33, 8]
    few = write_bucket(tmp_path, "few", lengths, sequence_length=8)
    writer = BucketWriter(tmp_path, "many", sequence_length=8, pad_id=PAD)
    writer.append(np.arange(10, 10 + sum(lengths), dtype=np.uint32), np.array(lengths), 2 * sum(lengths))
    writer.close({"language": "few"}, never_trained=False)
    for name in ("tokens.bin", "rows.bin", "documents.bin"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert few


def test_held_out_documents_come_back(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", {"ru": [9, 4], "unseen": []}, held=3)
    seen, unseen = read_held_out(store)
    assert (seen.name, seen.labels, seen.never_trained) == ("ru", {"language": "ru"}, False)
    assert unseen.never_trained
    for bucket in (seen, unseen):
        assert [document.tokens.tolist() for document in bucket.documents] == [[0], [0, 1], [0, 1, 2]]
        assert [document.num_bytes for document in bucket.documents] == [100, 101, 102]
    assert [info.name for info in BucketStore.open(store).infos()] == ["ru"]


FILES = ["tokens.bin", "rows.bin", "documents.bin", "held_out.bin", "held_out_sizes.bin"]


def read_everything(directory: Path) -> None:
    store = BucketStore.open(directory)
    for bucket in store.buckets.values():
        for row in range(bucket.manifest["rows"]):
            bucket.read_row(row)
            bucket.segment_ids(row)
    read_held_out(directory)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_refused_by_name(file: str, tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [9, 4, 30]})
    path = directory / "ru" / file
    intact = path.read_bytes()
    read_everything(directory)
    for position in range(0, len(intact), 5):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match="damaged") as caught:
            read_everything(directory)
        assert "ru" in str(caught.value)
        assert [damage.file for damage in verify_buckets(directory).damages] == [f"ru/{file}"]
    path.write_bytes(intact)
    read_everything(directory)


def test_the_damaged_row_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [40]})
    path = directory / "ru" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[2 * 32 + 3] ^= 4
    path.write_bytes(bytes(data))
    bucket = BucketStore.open(directory).buckets["ru"]
    bucket.read_row(1), bucket.read_row(3)
    with pytest.raises(UserError, match=r"bucket ru: row 2 of .*tokens\.bin is damaged; restore"):
        bucket.read_row(2)


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_or_missing_file_is_refused_when_opened(file: str, tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [9, 4, 30]})
    path = directory / "ru" / file
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        BucketStore.open(directory)
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read .*{file}"):
        BucketStore.open(directory)


def test_manifests_are_checked(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [9, 4, 30]})
    for path in (directory / "manifest.json", directory / "ru" / "manifest.json"):
        intact = path.read_text()
        for damaged in (intact.replace("8", "9", 1), intact[:-10], "[]", ""):
            path.write_text(damaged)
            with pytest.raises(UserError, match=r"manifest\.json is damaged"):
                BucketStore.open(directory)
        path.write_text(intact)
    other = write_store(tmp_path / "other", {"ru": [9, 4, 31]})
    shutil.copytree(other / "ru", directory / "ru", dirs_exist_ok=True)
    with pytest.raises(UserError, match="bucket ru is not the one"):
        BucketStore.open(directory)


def test_unfinished_and_future_directories_are_refused(tmp_path: Path) -> None:
    directory = write_store(tmp_path / "s", {"ru": [9]})
    values = read_json(directory / "manifest.json")
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no finished buckets.*launch prepare"):
        BucketStore.open(directory)
    write_json(directory / "manifest.json", {**values, "format_version": 99})
    with pytest.raises(UserError, match="buckets of format 99"):
        BucketStore.open(directory)
    assert json.loads((directory / "manifest.json").read_text())["digest"]


def test_a_run_that_cannot_read_them_is_refused(tmp_path: Path) -> None:
    store = BucketStore.open(write_store(tmp_path / "s", {"ru": [9]}))
    store.check(sequence_length=8, vocab_size=19)
    with pytest.raises(UserError, match=r"rows of 8 tokens, data\.sequence_length is 16"):
        store.check(sequence_length=16, vocab_size=19)
    with pytest.raises(UserError, match="bucket ru holds token 18, the model's vocab_size is 18"):
        store.check(sequence_length=8, vocab_size=18)


def test_an_abandoned_bucket_has_no_name(tmp_path: Path) -> None:
    with BucketWriter(tmp_path, "b", sequence_length=8, pad_id=PAD) as writer:
        writer.append(np.arange(100, dtype=np.uint32), np.array([100]), 5)
    assert not (tmp_path / "b").exists()
    write_bucket(tmp_path, "b", [3], sequence_length=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
