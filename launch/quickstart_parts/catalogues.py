"""English-Russian pairs from message catalogues (.mo files), as instructions to translate."""

import re
import struct
from collections.abc import Iterator

_MAGIC = 0x950412DE
_WORD = re.compile(r"[A-Za-z]{3,}")
_CYRILLIC = re.compile(r"[А-Яа-яЁё]{3,}")
MIN_CHARACTERS, MAX_CHARACTERS = 12, 600


def read_catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """Yields message and translation of a .mo file, plural forms and contexts left out.

    The format is that of GNU gettext's manual, "The Format of GNU MO Files"; a file that is none yields nothing.
    """
    try:
        order = "<" if struct.unpack_from("<I", content)[0] == _MAGIC else ">"
        magic, _, count, originals, translations = struct.unpack_from(f"{order}5I", content)
        if magic != _MAGIC:
            return
        for number in range(count):
            texts = []
            for table in (originals, translations):
                size, place = struct.unpack_from(f"{order}2I", content, table + 8 * number)
                texts.append(content[place : place + size].decode("utf-8"))
            if texts[0] and not any("\0" in text or "\4" in text for text in texts):
                yield texts[0], texts[1]
    except (struct.error, UnicodeDecodeError):
        return


def instructions(content: bytes, pairs_in_document: int = 6) -> list[str]:
    """Pairs worth learning from as documents: a request to translate and its answer, a few to a document."""
    pairs = [(a.strip(), b.strip()) for a, b in read_catalogue(content)]
    kept = [(a, b) for a, b in pairs if _is_worth(a, b)]
    chunks = [kept[i : i + pairs_in_document] for i in range(0, len(kept), pairs_in_document)]
    return ["\n\n".join(f"Переведите на русский: {a}\nОтвет: {b}" for a, b in chunk) for chunk in chunks]


def _is_worth(message: str, translation: str) -> bool:
    lengths = MIN_CHARACTERS <= len(message) <= MAX_CHARACTERS and len(translation) >= MIN_CHARACTERS
    return lengths and bool(_WORD.search(message)) and bool(_CYRILLIC.search(translation))
