"""The labelled corpus of configs/russian_25mb: catalogues are read, labels are written, the configs fit them."""

import gettext
import io
import json
import struct
from collections import Counter
from pathlib import Path

import pytest

from launch.quickstart_parts import debian, labelled
from launch.quickstart_parts.catalogues import instructions, read_catalogue
from tlite_jax.config_files import load_config
from tlite_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "russian_25mb"
MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "cannot open the file": "не удаётся открыть файл",
    "menu\4Open the file": "Открыть файл",
    "one file of them\0many files of them": "один файл\0много файлов",
    "%s": "%s и ещё кое-что",
    "yes, of course": "ага",
    "write the archive to standard output": "записать архив в стандартный вывод",
}


def catalogue(messages: dict[str, str], order: str = "<") -> bytes:
    """A .mo file."""
    pairs = sorted((a.encode(), b.encode()) for a, b in messages.items())
    tables: list[bytes] = []
    place = 28 + 16 * len(pairs)
    blob = b""
    for column in (0, 1):
        table = b""
        for pair in pairs:
            table += struct.pack(f"{order}2I", len(pair[column]), place + len(blob))
            blob += pair[column] + b"\0"
        tables.append(table)
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + b"".join(tables) + blob


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(order: str) -> None:
    content = catalogue(MESSAGES, order)
    theirs = gettext.GNUTranslations(io.BytesIO(content))
    found = dict(read_catalogue(content))
    assert set(found) == {a for a in MESSAGES if a and "\0" not in a and "\4" not in a}
    assert all(theirs.gettext(message) == translation for message, translation in found.items())
    assert list(read_catalogue(b"no catalogue")) == list(read_catalogue(content[:60])) == []


def test_pairs_worth_learning_from_become_instructions() -> None:
    (document,) = instructions(catalogue(MESSAGES))
    assert document == (
        "Переведите на русский: cannot open the file\nОтвет: не удаётся открыть файл\n\n"
        "Переведите на русский: write the archive to standard output\nОтвет: записать архив в стандартный вывод"
    )
    many = {f"message number {i} of many": f"сообщение номер {i} из многих" for i in range(13)}
    assert len(instructions(catalogue(many))) == 3


def test_documents_carry_the_labels_that_the_configs_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(names, directory):
        return {name: directory / name for name in names}

    def extract(recipe, packages):
        return [f"{recipe.name} {recipe.domain} {number}" for number in range(2)]

    monkeypatch.setattr(debian, "download", download)
    monkeypatch.setattr(debian, "read_files", lambda package, pattern: iter([("ru/x.mo", catalogue(MESSAGES))]))
    monkeypatch.setattr(labelled, "extract", extract)
    monkeypatch.setattr(labelled, "MIN_CHARACTERS", 20)
    labelled.write_labelled_corpus(tmp_path / "corpus", limit_mb=0.01, report=lambda line: None)
    stage1 = load_config(CONFIGS / "stage1.yaml")
    labels = set()
    for source in stage1.data.prepare.sources:
        lines = (tmp_path / "corpus" / Path(source.paths[0]).name).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(row["text"] and set(source.label_fields.values()) <= row.keys() for row in rows)
        assert len({row["id"] for row in rows}) == len(rows)
        labels |= {("source", source.name)} | {(label, row[label]) for row in rows for label in source.label_fields}
    # Every label that a mixture's patterns name is there.
    for stage in (stage1, load_config(CONFIGS / "stage2.yaml")):
        mixture = stage.data.mixture
        for pattern in (*mixture.targets, *mixture.rates, *mixture.balance):
            for term in pattern.split(", "):
                label, _, values = term.partition("=")
                assert {(label, value) for value in values.split("|")} <= labels
    assert Counter(label for label, _ in labels)["language"] == 3


def test_without_debian_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(names, directory):
        raise debian.UnavailableError("apt-get is not installed")

    monkeypatch.setattr(debian, "download", unavailable)
    with pytest.raises(UserError, match="Debian packages cannot be had: apt-get is not installed"):
        labelled.write_labelled_corpus(tmp_path / "corpus", limit_mb=None)
