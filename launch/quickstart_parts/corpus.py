"""The quickstart's text: Debian's documentation where apt can fetch it, otherwise the sample in this repository."""

import dataclasses
import gzip
import hashlib
import importlib.resources
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from launch.quickstart_parts import clean, debian
from launch.quickstart_parts.html import html_to_text
from launch.quickstart_parts.roff import roff_to_text
from tlite_jax.config import SourceConfig
from tlite_jax.errors import UserError

Kind = Literal["debian", "sample"]
VERSION = 2  # of what is extracted and how: a corpus of another version is built anew
MARKER = "corpus.json"
MIN_CHARACTERS, MAX_CHARACTERS = 200, 60_000  # a document is a whole page or file, never parts of one
MIN_RECURRENCE = 5  # a line in so many documents is boilerplate
NEVER_TRAINED = frozenset({"russian_aphorisms", "russian_letters"})
SAMPLE_SOURCES = ("russian", "russian_letters", "english", "code")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text on disk, as the sources of `data.prepare`.

    Attributes:
      kind: "debian", or "sample" for the small texts of this repository.
      sources: one per jsonl file; documents have the keys id, text, language ("ru", "en", "code") and domain.
        The source of held-out register has training=False.
    """

    kind: Kind
    sources: tuple[SourceConfig, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one source is made from files of Debian packages.

    Attributes:
      packages: Debian packages; those that this release lacks are left out, at least one must be there.
      files: regular expression that the whole path of a file in a package matches.
      convert: a file's text -> plain text or documents.
      max_bytes: of UTF-8 text in the whole source; files are taken in an order that only their names decide.
    """

    name: str
    language: Literal["ru", "en"]
    domain: str
    packages: tuple[str, ...]
    files: str
    convert: Callable[[str], list[str]]
    max_bytes: int


def man_page(text: str) -> list[str]:
    """A manual page as one document."""
    return [roff_to_text(text)]


def html_page(text: str) -> list[str]:
    """A page of HTML as one document."""
    return [html_to_text(text)]


FORTUNES = (
    "art|book|citates|computer|do_you_know|education|friendship|future|genious|haiku|happy|human_being|knowledge"
    "|life|programming|success|time|truth|war|wealth|work"
)
NOT_CONTENT = r"(?!index\.|search\.|genindex|developers-reference\.html|ld-|pr0|faqinfo)"
RECIPES = (
    Recipe(
        "russian_manuals",
        "ru",
        "manuals",
        ("manpages-ru", "manpages-ru-dev"),
        r"usr/share/man/ru/man\d/[^/]+\.gz",
        man_page,
        2_000_000,
    ),
    Recipe(
        "russian_office",
        "ru",
        "office",
        ("libreoffice-help-ru",),
        r"usr/share/libreoffice/help/ru/text/(swriter|scalc|simpress|sdraw|shared)/(01|02|guide)/[^/]+\.html",
        html_page,
        1_500_000,
    ),
    Recipe(
        "russian_guides",
        "ru",
        "guides",
        ("debian-faq-ru", "maint-guide-ru", "developers-reference-ru", "aptitude-doc-ru"),
        r"usr/share/(doc/debian/FAQ/ru|doc/maint-guide-ru/html|developers-reference/ru|doc/aptitude/html/ru)/"
        + NOT_CONTENT
        + r"[^/]+\.html",
        html_page,
        1_200_000,
    ),
    Recipe(
        "russian_aphorisms",
        "ru",
        "aphorisms",
        ("fortunes-ru",),
        rf"usr/share/games/fortunes/ru/({FORTUNES})",
        clean.fortunes,
        400_000,
    ),
    Recipe(
        "english_manuals",
        "en",
        "manuals",
        ("manpages",),
        r"usr/share/man/man\d/[^/]+\.gz",
        man_page,
        1_200_000,
    ),
    Recipe(
        "english_guides",
        "en",
        "guides",
        ("debian-faq", "maint-guide"),
        rf"usr/share/doc/(debian/FAQ|maint-guide/html)/{NOT_CONTENT}[^/]+\.en\.html",
        html_page,
        500_000,
    ),
)
CODE_BYTES = 1_200_000
_CODE_FOLDERS = ("", "asyncio", "collections", "concurrent/futures", "email", "html", "http", "importlib", "json")


def build_corpus(directory: Path, *, sample_only: bool = False, report: Callable[[str], object] = print) -> Corpus:
    """Writes one jsonl file per source, or finds those of an earlier call.

    Args:
      directory: made when absent; holds the files, and a marker that is written last.
      sample_only: no download, the sample of this repository.
      report: takes lines for the user.

    Returns:
      The corpus. A complete one of an earlier call is reused whatever its kind, except that sample_only refuses one
      from Debian.

    Raises:
      UserError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (found := _reusable(directory)) and (found == "sample" or not sample_only):
            report(f"corpus: reusing {directory} ({found})")
            return _corpus(directory, found)
        (directory / MARKER).unlink(missing_ok=True)
        kind: Kind = "sample"
        documents = None if sample_only else _debian_documents(directory, report)
        if documents is None:
            files = {name: _sample_file(name) for name in SAMPLE_SOURCES}
        else:
            kind, files = "debian", {name: _jsonl(name, *source) for name, source in documents.items()}
        for name, content in files.items():
            write_whole(directory / f"{name}.jsonl", content)
            num_documents = len(content.splitlines())
            report(f"corpus: {name}: {num_documents:,} documents, {len(content) / 1e6:.2f} MB")
        marker = {
            "version": VERSION,
            "kind": kind,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        write_whole(directory / MARKER, json.dumps(marker, indent=1).encode())
    except OSError as error:
        raise UserError(f"cannot write the corpus: {error}; choose another output directory") from error
    return _corpus(directory, kind)


def _reusable(directory: Path) -> Kind | None:
    try:
        marker = json.loads((directory / MARKER).read_text())
        kind, hashes = marker["kind"], marker["sha256"]
        intact = marker["version"] == VERSION and hashes.keys() == set(_names(kind))
        intact = intact and all(
            hashlib.sha256((directory / f"{name}.jsonl").read_bytes()).hexdigest() == expected
            for name, expected in hashes.items()
        )
        return kind if intact else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _names(kind: Kind) -> tuple[str, ...]:
    return {"sample": SAMPLE_SOURCES, "debian": (*(recipe.name for recipe in RECIPES), "code")}[kind]


def _corpus(directory: Path, kind: Kind) -> Corpus:
    return Corpus(
        kind,
        tuple(
            SourceConfig(
                name=name,
                paths=(str(directory / f"{name}.jsonl"),),
                format="jsonl",
                label_fields={"language": "language", "domain": "domain"},
                training=name not in NEVER_TRAINED,
            )
            for name in _names(kind)
        ),
    )


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _jsonl(name: str, language: str, domain: str, texts: list[str]) -> bytes:
    rows = (
        {"id": f"{name}-{number}", "text": text, "language": language, "domain": domain}
        for number, text in enumerate(texts)
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _sample_file(name: str) -> bytes:
    file = importlib.resources.files("tlite_jax") / "data" / "sample" / f"{name}.jsonl"
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"this installation lacks {file}: install tlite_jax from its repository") from error


Source = tuple[str, str, list[str]]  # language, domain, documents


def _debian_documents(directory: Path, report: Callable[[str], object]) -> dict[str, Source] | None:
    """The texts of every source from Debian packages, or None when they cannot be had."""
    with tempfile.TemporaryDirectory(prefix=".packages-", dir=directory) as scratch:
        try:
            wanted = [package for recipe in RECIPES for package in recipe.packages]
            packages = debian.download(wanted, Path(scratch))
            if lacking := [r.name for r in RECIPES if not packages.keys() & set(r.packages)]:
                raise debian.UnavailableError(f"no package for {', '.join(lacking)}")
            sources: dict[str, Source] = {}
            for recipe in RECIPES:
                found = [packages[name] for name in recipe.packages if name in packages]
                texts = extract(recipe, found)
                if not texts:
                    raise debian.UnavailableError(f"nothing to extract for {recipe.name}")
                sources[recipe.name] = (recipe.language, recipe.domain, texts)
        except debian.UnavailableError as error:
            report(f"corpus: Debian packages cannot be had ({error}); using the small sample of this repository")
            return None
    sources["code"] = ("code", "python", standard_library())
    return sources


def extract(recipe: Recipe, packages: list[Path]) -> list[str]:
    """Texts of a recipe's source from its packages' files, cleaned, each once, up to about its max_bytes."""
    files = {name: data for package in packages for name, data in debian.read_files(package, recipe.files)}
    pages = [page for name in sorted(files, key=_shuffled) for page in recipe.convert(_decode(name, files[name]))]
    pages = clean.drop_boilerplate(pages, MIN_RECURRENCE)
    keep = clean.russian_only if recipe.language == "ru" else clean.drop_empty_sections
    documents: dict[str, None] = {}  # an ordered set
    size = 0
    for page in pages:
        if size > recipe.max_bytes:
            break
        text = keep(page).replace("\f", "")
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and text not in documents:
            documents[text] = None
            size += len(text.encode())
    return list(documents)


def _decode(name: str, data: bytes) -> str:
    data = gzip.decompress(data) if name.endswith(".gz") else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("koi8-r" if "/ru/" in name else "latin-1")


def _shuffled(name: str) -> str:
    """A key that orders names as if shuffled, everywhere and always the same."""
    return hashlib.sha256(name.encode()).hexdigest()


def standard_library(max_bytes: int = CODE_BYTES) -> list[str]:
    """Modules of Python's standard library, up to about so many bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for folder in _CODE_FOLDERS for path in (root / folder).glob("*.py")]
    documents: list[str] = []
    size = 0
    for path in sorted(paths, key=lambda path: _shuffled(path.relative_to(root).as_posix())):
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\f", "")
        except (OSError, UnicodeDecodeError):
            continue
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and not path.name.startswith("_sysconfigdata"):
            documents.append(text)
            size += len(text.encode())
        if size > max_bytes:
            break
    return documents
