"""`verify` finds every change to what was written, and says where."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from test_buckets import write_store
from typer.testing import CliRunner

from launch import verify as command
from tlite_jax.data.files import file_entry, read_json, write_json
from tlite_jax.data.verify import verify_buckets
from tlite_jax.errors import UserError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "s", {"ru": [9, 40, 30], "unseen": []})


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def test_intact_buckets_are_said_to_be(store: Path) -> None:
    found = verify_buckets(store)
    assert found.damages == ()
    assert found.files == len(files_of(store)) == 13
    assert found.bytes == sum(path.stat().st_size for path in files_of(store))


def test_every_flipped_bit_is_found_and_placed(store: Path) -> None:
    rng = np.random.default_rng(0)
    for path in files_of(store):
        intact = path.read_bytes()
        for _ in range(60 if intact else 0):
            position, bit = int(rng.integers(len(intact))), int(rng.integers(8))
            damaged = bytearray(intact)
            damaged[position] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            name = str(path.relative_to(store))
            places = [damage for damage in verify_buckets(store).damages if damage.file == name]
            assert places, f"bit {bit} of byte {position} of {name} was not found"
            assert any(place.offset <= position < place.offset + place.bytes for place in places)
        path.write_bytes(intact)
    assert not verify_buckets(store).damages


def test_a_truncated_longer_or_missing_file_is_found(store: Path) -> None:
    for path in files_of(store):
        intact = path.read_bytes()
        name = str(path.relative_to(store))
        for changed in (intact[:-1], intact[: len(intact) // 2], intact + b"\0"):
            if changed == intact:
                continue
            path.write_bytes(changed)
            assert name in [damage.file for damage in verify_buckets(store).damages]
        path.unlink()
        if name == "manifest.json":
            with pytest.raises(UserError, match="unfinished buckets"):
                verify_buckets(store)
        else:
            assert name in [damage.file for damage in verify_buckets(store).damages]
        path.write_bytes(intact)


def test_damage_in_a_large_file_is_placed_to_its_block(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", {"ru": [1] * 40_000}, sequence_length=1024)
    for name in ("documents.bin", "tokens.bin"):
        path = store / "ru" / name
        intact = bytearray(path.read_bytes())
        intact[150_000] ^= 1
        path.write_bytes(bytes(intact))
    found = {damage.file: (damage.offset, damage.bytes) for damage in verify_buckets(store).damages}
    assert found == {"ru/tokens.bin": (36 * 4096, 4096), "ru/documents.bin": (2 * 65536, 65536)}


def test_lists_beside_the_buckets_are_checked(store: Path) -> None:
    values = read_json(store / "manifest.json")
    (store / "duplicates.jsonl").write_text("{}")
    write_json(
        store / "manifest.json", {**values, "lists": {"duplicates.jsonl": file_entry(store / "duplicates.jsonl")}}
    )
    assert not verify_buckets(store).damages
    (store / "duplicates.jsonl").write_text("{")
    assert [str(damage) for damage in verify_buckets(store).damages] == [
        "duplicates.jsonl: bytes 1..2: 1 bytes instead of 2"
    ]


def test_one_damaged_row_is_placed_to_the_row(store: Path) -> None:
    path = store / "ru" / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[3 * 32 + 5] ^= 8
    path.write_bytes(bytes(data))
    (damage,) = verify_buckets(store).damages
    assert (damage.file, damage.offset, damage.bytes) == ("ru/tokens.bin", 96, 32)
    assert str(damage) == "ru/tokens.bin: bytes 96..128: row 3 is damaged"


def call(*words: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, UserError):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_command_says_what_it_found(store: Path, tmp_path: Path) -> None:
    status, printed = call(str(store))
    assert status == 0
    assert "buckets, intact: 13 files" in printed
    (store / "notes.txt").write_text("mine")
    (store / "ru" / "held_out.bin").write_bytes(b"")
    status, printed = call(str(store))
    assert status == 1
    assert "damaged: ru/held_out.bin" in printed
    assert "not checked: notes.txt" in printed
    status, printed = call(str(store), "--json")
    values = json.loads(printed)
    assert (status, values["intact"], values["damages"][0]["file"]) == (1, False, "ru/held_out.bin")
    with pytest.raises(UserError, match=r"is none of: .*buckets"):
        call(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        call(str(tmp_path / "nothing"))
