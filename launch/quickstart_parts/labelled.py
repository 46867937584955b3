"""20 MB of text with labels for configs/russian_25mb: Debian's documentation by source, style and domain."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launch.quickstart_parts import clean, debian
from launch.quickstart_parts.catalogues import instructions
from launch.quickstart_parts.corpus import (
    MIN_CHARACTERS,
    NOT_CONTENT,
    Recipe,
    extract,
    html_page,
    man_page,
    standard_library,
    write_whole,
)
from tlite_jax.errors import UserError

_MAN, _OFFICE = ("manpages-ru", "manpages-ru-dev"), ("libreoffice-help-ru",)
_GUIDES = ("debian-faq-ru", "maint-guide-ru", "developers-reference-ru", "aptitude-doc-ru")
CATALOGUES = ("coreutils", "dpkg", "apt", "bash", "tar", "gnupg-l10n", "binutils-common", "wget", "aptitude-common")
_HELP = r"usr/share/libreoffice/help/ru/text/"
_GUIDE_FILES = (
    r"usr/share/(doc/debian/FAQ/ru|doc/maint-guide-ru/html|developers-reference/ru|doc/aptitude/html/ru)/"
    + NOT_CONTENT
    + r"[^/]+\.html"
)


@dataclass(frozen=True)
class Labelled:
    """A recipe whose documents share a source and a style; the recipe's domain is a label too."""

    source: str
    style: str
    recipe: Recipe


def _recipes() -> list[Labelled]:
    manuals = (("commands", "1"), ("programming", "[23]"), ("formats", "5"), ("administration", "[478]"))
    result = [
        _made("manuals", "reference", domain, _MAN, rf"usr/share/man/ru/man{number}/[^/]+\.gz", man_page, 6)
        for domain, number in manuals
    ]
    for domain, folder in (("writer", "swriter"), ("calc", "scalc"), ("draw", "s(draw|impress)"), ("shared", "shared")):
        files = rf"{_HELP}{folder}/(01|02|03|04|05|06|07|guide|optionen|autopi)/[^/]+\.html"
        result.append(_made("office", "help", domain, _OFFICE, files, html_page, 4))
    fortunes = r"usr/share/games/fortunes/ru/[^/.]+"
    english = rf"usr/share/doc/(debian/FAQ|maint-guide/html)/{NOT_CONTENT}[^/]+\.en\.html"
    return [
        *result,
        _made("guides", "article", "debian", _GUIDES, _GUIDE_FILES, html_page, 4),
        _made("aphorisms", "quotes", "aphorisms", ("fortunes-ru",), fortunes, clean.fortunes, 3),
        _made("english_manuals", "reference", "system", ("manpages",), r"usr/share/man/man\d/[^/]+\.gz", man_page, 2),
        _made("english_guides", "article", "debian", ("debian-faq", "maint-guide"), english, html_page, 1),
    ]


def _made(
    source: str,
    style: str,
    domain: str,
    packages: tuple[str, ...],
    files: str,
    convert: Callable[[str], list[str]],
    megabytes: int,
) -> Labelled:
    language: Literal["ru", "en"] = "en" if source.startswith("english") else "ru"
    recipe = Recipe(source, language, domain, packages, files, convert, megabytes * 1_000_000)
    return Labelled(source, style, recipe)


def write_labelled_corpus(directory: Path, *, limit_mb: float | None, report: Callable[[str], object] = print) -> Path:
    """Writes one jsonl file per source; documents have id, text, language, style and domain.

    Args:
      directory: made when absent; files in it are replaced.
      limit_mb: the most of each recipe, for a try; None: all.
      report: takes a line per source.

    Returns:
      `directory`.

    Raises:
      UserError: Debian's packages cannot be had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    recipes = _recipes()
    if limit_mb is not None:
        recipes = [replace(r, recipe=replace(r.recipe, max_bytes=int(limit_mb * 1e6))) for r in recipes]
    code_bytes = int((limit_mb or 3) * 1e6)
    rows: dict[str, list[dict[str, str]]] = {}
    with tempfile.TemporaryDirectory(prefix=".packages-", dir=directory) as scratch:
        try:
            wanted = sorted({name for r in recipes for name in r.recipe.packages} | set(CATALOGUES))
            packages = debian.download(wanted, Path(scratch))
            for item in recipes:
                found = [packages[name] for name in item.recipe.packages if name in packages]
                texts = extract(item.recipe, found)
                if not texts:
                    raise debian.UnavailableError(f"nothing to extract for {item.source}/{item.recipe.domain}")
                _add(rows, item.source, item.recipe.language, item.style, item.recipe.domain, texts)
            for name in CATALOGUES:
                if name in packages:
                    _add(rows, "instructions", "ru", "instruction", name, _pairs(packages[name], limit_mb))
        except debian.UnavailableError as error:
            raise UserError(f"Debian packages cannot be had: {error}") from error
    _add(rows, "code", "code", "code", "python", standard_library(code_bytes))
    for source, documents in rows.items():
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in documents).encode()
        write_whole(directory / f"{source}.jsonl", content)
        size = sum(len(row["text"].encode()) for row in documents)
        report(f"{source}: {len(documents):,} documents, {size / 1e6:.2f} MB of text")
    return directory


def _pairs(package: Path, limit_mb: float | None) -> list[str]:
    found: list[str] = []
    for _, content in debian.read_files(package, r"usr/share/locale/ru/LC_MESSAGES/[^/]+\.mo"):
        found += [text for text in instructions(content) if len(text) >= MIN_CHARACTERS]
    return found if limit_mb is None else found[: int(limit_mb * 1000)]


def _add(
    rows: dict[str, list[dict[str, str]]], source: str, language: str, style: str, domain: str, texts: list[str]
) -> None:
    documents = rows.setdefault(source, [])
    for text in texts:
        labels = {"language": language, "style": style, "domain": domain}
        documents.append({"id": f"{source}-{len(documents)}", "text": text, **labels})
