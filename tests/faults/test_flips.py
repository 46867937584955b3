"""A slice of the flipped bits and truncations; `make test-faults` runs 1,000 and 200."""

import hashlib
from pathlib import Path

import pytest

from tests.bridge.fuzzing import made_gguf, made_hf
from tests.faults.flips import Artefact, is_found, sweep
from tlite_jax.bridge.checksums import SUMS_NAME, read_sums, sums_text
from tlite_jax.errors import UserError


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Artefact]:
    scratch = tmp_path_factory.mktemp("exports")
    made_hf(scratch / "hf", max_shard_bytes=30_000)
    made_gguf(scratch / "gguf")
    return [Artefact(name, scratch / name, scratch / name) for name in ("hf", "gguf")]


@pytest.mark.parametrize(("cut", "count"), [(False, 200), (True, 60)])
def test_every_flipped_bit_and_every_cut_is_found(exports: list[Artefact], cut: bool, count: int) -> None:
    assert not any(is_found(artefact) for artefact in exports)
    assert sum(sweep(exports, count, seed=2, cut=cut).values()) == count
    assert not any(is_found(artefact) for artefact in exports)


def test_what_nothing_vouches_for_is_missed(exports: list[Artefact]) -> None:
    """The sweep itself can fail."""
    missed: list[str] = []
    directory = exports[0].directory
    sums = (directory / SUMS_NAME).read_bytes()
    (directory / SUMS_NAME).unlink()
    sweep([exports[0]], 40, seed=3, cut=False, report=missed.append)
    (directory / SUMS_NAME).write_bytes(sums)
    assert missed
    assert "hf: " in missed[0]


@pytest.mark.parametrize("spoil", [lambda text: text[:-1], lambda text: text[:-1] + "\x0b", lambda text: ""])
def test_a_list_of_hashes_is_whole(spoil, tmp_path: Path) -> None:
    path = tmp_path / SUMS_NAME
    text = sums_text({"a": hashlib.sha256(b"a").hexdigest(), "b": hashlib.sha256(b"b").hexdigest()})
    path.write_text(text)
    assert read_sums(path).keys() == {"a", "b"}
    path.write_text(spoil(text))
    with pytest.raises(UserError, match="cut short"):
        read_sums(path)
