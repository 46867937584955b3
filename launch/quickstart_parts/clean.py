"""What extracted text still needs: no boilerplate, no untranslated passages, documents of a fit size."""

import collections
import re
from collections.abc import Callable, Iterable

_CYRILLIC = re.compile(r"[А-Яа-яЁё]")
_LETTER = re.compile(r"[^\W\d_]")
_ENGLISH_WORD = re.compile(r"(?<![\w/.:\-])[A-Za-z]?[a-z]+(?![\w/(=:\-])")
_MIN_RUSSIAN_SHARE = 0.3


def drop_boilerplate(documents: Iterable[str], min_documents: int, *, min_characters: int = 30) -> list[str]:
    """Drops the lines that recur from document to document.

    Args:
      documents: texts of one source; a line is a paragraph.
      min_documents: a line found in at least so many documents is dropped from all of them.
      min_characters: shorter lines (headings, names of options) stay.

    Returns:
      The documents in their order, without those lines; ones that become empty stay, as "".
    """
    documents = list(documents)
    counts: collections.Counter[str] = collections.Counter()
    for text in documents:
        counts.update({line.strip() for line in text.splitlines() if len(line.strip()) >= min_characters})
    recurring = {line for line, count in counts.items() if count >= min_documents}
    if not recurring:
        return documents
    kept = ("\n".join(line for line in text.split("\n") if line.strip() not in recurring) for text in documents)
    return [re.sub(r"\n{3,}", "\n\n", text).strip("\n") for text in kept]


def russian_only(text: str) -> str:
    """Drops what a translation left in English, and listings of code.

    Args:
      text: paragraphs separated by blank lines; headings begin with a form feed.

    Returns:
      The paragraphs in which at least 0.3 of the letters are Cyrillic, and short ones with any Cyrillic letter. Empty
      when Russian is less than half of all letters that remain.
    """
    kept = _map_blocks(text, _russian_block)
    return kept if len(_CYRILLIC.findall(kept)) >= 0.5 * len(_LETTER.findall(kept)) > 0 else ""


def _russian_block(block: str) -> str:
    if _russian_share(block) < _MIN_RUSSIAN_SHARE and len(_LETTER.findall(block)) >= 30:
        return ""
    kept = "\n".join(line for line in block.split("\n") if not _is_english(line))
    return kept if _CYRILLIC.search(kept) else ""


def _is_english(line: str) -> bool:
    return _russian_share(line) < _MIN_RUSSIAN_SHARE and len(_ENGLISH_WORD.findall(line)) >= 3


def _russian_share(text: str) -> float:
    return len(_CYRILLIC.findall(text)) / max(1, len(_LETTER.findall(text)))


def drop_empty_sections(text: str) -> str:
    """Drops the headings (lines that begin with a form feed) that no text follows."""
    return _map_blocks(text, lambda block: block)


def _map_blocks(text: str, function: Callable[[str], str]) -> str:
    """Applies a function to the blocks between blank lines; sections that become empty lose their heading."""
    sections = []
    for number, section in enumerate(text.split("\f")):
        heading, _, body = section.partition("\n") if number else ("", "", section)
        blocks = [kept for block in re.split(r"\n\s*\n", body) if (kept := function(block)).strip()]
        if blocks:
            sections.append(("\f" + heading + "\n" if number else "") + "\n\n".join(blocks))
    return "\n\n".join(sections)


def fortunes(text: str, document_characters: int = 1000) -> list[str]:
    """Splits a fortune file into sayings and joins neighbours into documents.

    Args:
      text: sayings separated by lines that hold only a percent sign; `-- NAME` lines name their author.
      document_characters: a document ends with the saying that makes it so long.

    Returns:
      Documents: sayings separated by blank lines, hard line breaks removed, authors after a dash.
    """
    documents, current = [], ""
    for saying in re.split(r"^%\s*$", text, flags=re.MULTILINE):
        if unwrapped := _unwrap(saying):
            current = f"{current}\n\n{unwrapped}" if current else unwrapped
        if len(current) >= document_characters:
            documents.append(current)
            current = ""
    return [*documents, current] if current else documents


def _unwrap(saying: str) -> str:
    lines: list[str] = []
    wrapped = False
    for line in saying.expandtabs().splitlines():
        stripped = " ".join(line.split())
        author = re.match(r"(?:--+|—)\s*(.*)", stripped)
        if author and line.startswith(" "):
            name = author[1].strip()
            if name and "неизвест" not in name.lower():
                lines.append(f"— {name}")
            wrapped = False
        elif stripped and wrapped and not re.match(r"[-–—*\d]", stripped):
            lines[-1] += " " + stripped
            wrapped = len(line.rstrip()) > 50
        elif stripped:
            lines.append(stripped)
            wrapped = len(line.rstrip()) > 50
    return "\n".join(lines)
