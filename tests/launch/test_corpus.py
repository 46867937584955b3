"""The quickstart's text: no network, no apt."""

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.quickstart_parts import corpus, debian
from tlite_jax.errors import UserError


def rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def no_apt(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    raise FileNotFoundError("apt-get")


def refused(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 100, "", "W: noise\nE: Unable to fetch some\narchives")


def too_slow(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
    raise subprocess.TimeoutExpired(command, 1)


@pytest.mark.parametrize(
    ("run", "reason"), [(no_apt, "is not installed"), (refused, "E: Unable to fetch"), (too_slow, "took longer")]
)
def test_without_packages_the_sample_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., object], reason: str
) -> None:
    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    built = corpus.build_corpus(tmp_path / "corpus", report=said.append)
    assert built.kind == "sample"
    assert [line for line in said if "sample" in line and reason in line and "\n" not in line] == said[:1]
    assert {source.name: source.training for source in built.sources} == {
        "russian": True,
        "russian_letters": False,
        "english": True,
        "code": True,
    }
    languages = {source.name: {row["language"] for row in rows(source.paths[0])} for source in built.sources}
    assert languages == {"russian": {"ru"}, "russian_letters": {"ru"}, "english": {"en"}, "code": {"code"}}
    assert all(source.label_fields == {"language": "language", "domain": "domain"} for source in built.sources)
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == sorted(
        ["corpus.json", *(f"{source.name}.jsonl" for source in built.sources)]
    ), "nothing temporary stays"


def test_a_complete_corpus_is_reused_and_a_damaged_one_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = corpus.build_corpus(tmp_path, sample_only=True, report=lambda line: None)
    english = Path(first.sources[2].paths[0])
    before = english.read_bytes(), english.stat().st_ino
    monkeypatch.setattr(subprocess, "run", no_apt)
    said: list[str] = []
    assert corpus.build_corpus(tmp_path, report=said.append) == first
    assert len(said) == 1
    assert "reusing" in said[0]
    assert (english.read_bytes(), english.stat().st_ino) == before

    english.write_bytes(before[0][:-10])
    assert corpus.build_corpus(tmp_path, sample_only=True, report=said.append) == first
    assert english.read_bytes() == before[0]

    (tmp_path / "corpus.json").write_text('{"version": 1, "kind"')
    assert corpus.build_corpus(tmp_path, sample_only=True, report=said.append) == first


def test_an_unwritable_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"choose another output directory$"):
        corpus.build_corpus(tmp_path / "file" / "corpus", sample_only=True)


def deb_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("./usr/share/man/ru/man1/link.1.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return buffer.getvalue()


def paragraph(number: int) -> str:
    return f"Раздел {number} рассказывает о настройке номер {number}. " + f"Слово{number} повторяется. " * 12


def fake_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """apt-get and dpkg-deb replaced by ones that hand out small packages of the real layout."""
    english = "This part explains how option {0} behaves when it is set. " * 6
    page = "<html><body><div class='navheader'>назад</div><h1>Раздел</h1><p>{}</p></body></html>"
    manual = ".SH ИМЯ\nф - файл\n.SH ОПИСАНИЕ\n{}\n.SH ПЕРЕВОД\nПеревёл Кто-то.\n"
    contents: dict[str, dict[str, bytes]] = {
        "manpages-ru": {
            f"usr/share/man/ru/man1/p{n}.1.gz": gzip.compress(manual.format(paragraph(n)).encode()) for n in range(9)
        },
        "libreoffice-help-ru": {
            f"usr/share/libreoffice/help/ru/text/swriter/01/{n}.html": page.format(paragraph(n + 20)).encode()
            for n in range(9)
        },
        "debian-faq-ru": {"usr/share/doc/debian/FAQ/ru/a.ru.html": page.format(paragraph(30)).encode()},
        "fortunes-ru": {
            "usr/share/games/fortunes/ru/work": ("\n%\n".join(map(paragraph, range(40, 60)))).encode("koi8-r"),
            "usr/share/games/fortunes/ru/other": paragraph(70).encode(),
        },
        "manpages": {
            "usr/share/man/man1/a.1.gz": gzip.compress(f".SH DESCRIPTION\n{english.format(1)}".encode()),
        },
        "debian-faq": {"usr/share/doc/debian/FAQ/a.en.html": page.format(english.format(2)).encode()},
    }

    def run(command: list[str], *, cwd: Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
        names = [word for word in command if word in contents]
        if command[:2] == ["apt-cache", "policy"]:
            known = "".join(f"{n}:\n  Installed: (none)\n  Candidate: 1.0\n" for n in names)
            return subprocess.CompletedProcess(
                command, 0, known + "maint-guide:\n  Installed: (none)\n  Candidate: (none)\n"
            )
        assert command[0] == "apt-get"
        assert "maint-guide" not in command, "not in this release"
        for name in names:
            (Path(cwd) / f"{name}_1%3a1.0_all.deb").write_bytes(deb_tar(contents[name]))
        return subprocess.CompletedProcess(command, 0, "", "W: Download is performed unsandboxed")

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: popen(["cat", command[2]], **kwargs))


def test_debian_packages_become_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_debian(monkeypatch, tmp_path)
    built = corpus.build_corpus(tmp_path / "corpus", report=lambda line: None)
    assert built.kind == "debian"
    texts = {source.name: rows(source.paths[0]) for source in built.sources}
    assert {name for name in texts if name not in corpus.NEVER_TRAINED} == {s.name for s in built.sources if s.training}
    assert [source.name for source in built.sources if not source.training] == ["russian_aphorisms"]
    assert len(texts["russian_manuals"]) == 9
    manual = next(row for row in texts["russian_manuals"] if "номер 3." in row["text"])
    assert manual["text"] == f"ИМЯ\nф - файл\n\nОПИСАНИЕ\n{paragraph(3).strip()}"
    assert (manual["language"], manual["domain"]) == ("ru", "manuals")
    assert "назад" not in texts["russian_office"][0]["text"]
    aphorisms = "\n".join(row["text"] for row in texts["russian_aphorisms"])
    assert "номер 45." in aphorisms, "KOI8-R is recognised"
    assert "номер 70." not in aphorisms
    code = "\n".join(row["text"] for row in texts["code"])
    assert "def " in code
    assert len(code) > 500_000
    ids = [row["id"] for source in texts.values() for row in source]
    assert len(ids) == len(set(ids))
    assert all(len(row["text"]) >= 200 for source in texts.values() for row in source)
    assert not list((tmp_path / "corpus").glob(".*"))

    other = corpus.build_corpus(tmp_path / "again", report=lambda line: None)
    for one, two in zip(built.sources, other.sources, strict=True):
        assert Path(one.paths[0]).read_bytes() == Path(two.paths[0]).read_bytes()
    assert corpus.build_corpus(tmp_path / "again", sample_only=True, report=lambda line: None).kind == "sample"


def test_a_package_that_did_not_come_means_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_debian(monkeypatch, tmp_path)
    monkeypatch.setattr(subprocess, "Popen", no_apt)
    assert corpus.build_corpus(tmp_path, report=lambda line: None).kind == "sample"


def test_a_cut_package_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_1_all.deb"
    package.write_bytes(deb_tar({"a": b"x" * 2000})[:1000])
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: popen(["cat", command[2]], **kwargs))
    with pytest.raises(debian.UnavailableError):
        list(debian.read_files(package, "a"))
