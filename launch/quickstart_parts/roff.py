"""Manual pages (roff with the `man` macros) to plain text, one paragraph a line."""

import re

# fmt: off
# Sections that say who made a page and under which terms: the same few sentences on every page.
DROPPED_SECTIONS = frozenset(
    {
        "ПЕРЕВОД", "COLOPHON", "АВТОР", "АВТОРЫ", "AUTHOR", "AUTHORS", "АВТОРСКИЕ ПРАВА", "COPYRIGHT",
        "LICENSE", "СМ. ТАКЖЕ", "СМОТРИТЕ ТАКЖЕ", "SEE ALSO", "ИНФОРМАЦИЯ ОБ ОШИБКАХ",
        "СООБЩЕНИЯ ОБ ОШИБКАХ", "REPORTING BUGS", "LIBRARY", "БИБЛИОТЕКА", "АТРИБУТЫ", "ATTRIBUTES",
        "СТАНДАРТЫ", "STANDARDS"
    }
)
# Special characters of groff_char(7) that occur in manual pages.
CHARACTERS = {
    "em": "—", "en": "–", "hy": "-", "bu": "•", "co": "©", "rg": "®", "tm": "™", "de": "°", "12": "½", "14": "¼",
    "aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "Bq": "„", "Fo": "«", "Fc": "»", "fo": "‹",
    "fc": "›", "la": "⟨", "ra": "⟩", "ti": "~", "ha": "^", "ga": "`", "rs": "\\", "ba": "|", "bv": "|", "or": "|",
    "->": "→", "<-": "←", "mu": "×", "<=": "≤", ">=": "≥", "+-": "±", "!=": "≠", "sc": "§", "dg": "†", "dd": "‡",
    "fm": "′", "sd": "″", "sh": "#", "at": "@", "Do": "$", "mc": "µ", "ss": "ß", "sq": "□", "lB": "[", "rB": "]",
    "lC": "{", "rC": "}", "sl": "/", "ul": "_", "aa": "´", "pl": "+", "mi": "−", "eq": "=", "no": "¬", "Eu": "€",
}
STRINGS = {"lq": "“", "rq": "”", "R": "®", "Tm": "™", "dg": "†", "-": "-", "Aq": "'"}
FONT_MACROS = frozenset(
    {
        "B", "I", "BR", "BI", "IR", "IB", "RB", "RI", "SB", "SM"
    }
)
BREAK_MACROS = frozenset(
    {
        "PP", "P", "LP", "HP", "sp", "br", "RS", "RE", "in", "ti", "TP", "TQ", "IP", "SY", "YS", "INDENT",
        "UNINDENT", "bp"
    }
)
# fmt: on
SHORT = 60  # characters: a tag, not a paragraph
MAX_LISTING_LINES = 3  # longer ones are programs, not prose

_ESCAPE = re.compile(
    r"""\\(?:
      f(?:\[[^]]*\]|\(..|.) | [FmM]\[[^]]*\] | s[+-]?\d+ | [hvwoLlDXxZ]'[^']*'   # fonts, sizes, motions
    | n(?:\[[^]]*\]|\(..|[+-]?.) | \$.                                           # number registers, arguments
    | \*(?:\[(?P<string3>[^]]*)\]|\((?P<string2>..)|(?P<string1>.))
    | \[(?P<long>[^]]*)\] | \((?P<short>..)
    | (?P<character>.)
    )""",
    re.VERBOSE,
)
_ONE_CHARACTER = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "´", "`": "`", ".": ".", "t": " "}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"\\])(?:\\.|[^\s\\])*)')


def unescape(text: str) -> str:
    """Replaces roff escapes by the characters that they print; those that print nothing vanish."""

    def printed(match: re.Match[str]) -> str:
        string = match["string3"] or match["string2"] or match["string1"]
        if string is not None:
            return STRINGS.get(string, "")
        name = match["long"] or match["short"]
        if name is not None:
            if re.fullmatch(r"u[0-9A-F]{4,5}", name):
                return chr(int(name[1:], 16))
            return CHARACTERS.get(name, name[1:] if len(name) == 2 and name[0] in ":'`^~," else "")
        return _ONE_CHARACTER.get(match["character"] or "", "")

    return _ESCAPE.sub(printed, re.sub(r'\\["#].*', "", text))


def arguments(line: str) -> list[str]:
    """Splits a macro's arguments: words, or text in double quotes."""
    line = re.sub(r'(?<!\\)\\["#].*', "", line)
    return [(quoted or word).replace('""', '"') for quoted, word in _ARGUMENT.findall(line)]


class _Page:
    """Collects the paragraphs of one page while its lines are read."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.dropping = False
        self.filled = True
        self.listing: list[str] = []  # lines that are not filled
        self.tag_lines = 0  # lines of a .TP tag still to come
        self.joined = False  # the last line ended in \c

    def flush(self) -> None:
        text = " ".join(self.words).strip()
        self.words, self.joined = [], False
        if text and not self.dropping:
            self.blocks.append(re.sub(r"[ \t]+", " ", text))
        if 0 < len(self.listing) <= MAX_LISTING_LINES and not self.dropping:
            self.blocks += ["", *self.listing, ""]
        self.listing = []

    def add(self, text: str) -> None:
        joins_next = text.endswith("\\c")
        printed = unescape(text)
        if self.filled:
            if self.joined and self.words:
                self.words[-1] += printed
            elif printed.strip():
                self.words.append(printed.strip())
            self.joined = joins_next
            if self.tag_lines and printed.strip():
                self.tag_lines -= 1
                if not self.tag_lines:
                    self.flush()
        elif printed.strip():
            self.listing.append(printed.rstrip())

    def heading(self, text: str, *, is_section: bool) -> None:
        self.flush()
        title = " ".join(unescape(text).split())
        if is_section:
            self.dropping = title.strip(" :").upper() in DROPPED_SECTIONS
            self.filled = True
        if title and not self.dropping:
            self.blocks.append("\f" + title)


def roff_to_text(source: str) -> str:
    """Converts one manual page.

    Args:
      source: the page's roff, uncompressed. Comments, macro definitions, tables, listings longer than three lines and
        sections about authorship and licence are dropped.

    Returns:
      Plain text: a paragraph a line, blank lines between paragraphs, a form feed before every heading. Empty for a
      page that only refers to another (`.so`) and for the `mdoc` macros, which are not read.
    """
    if re.search(r"^\.(Dd|Dt) ", source, re.MULTILINE):
        return ""
    page, skip_until = _Page(), ""
    heading_next: str | None = None
    for line in source.splitlines():
        if skip_until:
            skip_until = "" if re.match(skip_until, line) else skip_until
            continue
        match = re.match(r"[.'][ \t]*([A-Za-z]*)[ \t]*(.*)", line)
        if match is None:
            if heading_next is not None:
                page.heading(line, is_section=heading_next == "SH")
                heading_next = None
            else:
                _text_line(page, line)
            continue
        name, rest = match.groups()
        heading_next = name if name in ("SH", "SS") and not rest else None
        skip_until = _macro(page, name, rest)
    page.flush()
    return _join(page.blocks)


def _text_line(page: _Page, line: str) -> None:
    if not line.strip() and page.filled:
        page.flush()
    elif page.filled and line[0] in " \t" and page.words:
        page.flush()
        page.add(line)
    else:
        page.add(line)


def _macro(page: _Page, name: str, rest: str) -> str:
    """Acts on one macro line; returns the pattern of the line up to which all is to be skipped, or nothing."""
    if name in ("SH", "SS") and rest:
        page.heading(" ".join(arguments(rest)), is_section=name == "SH")
    elif name in FONT_MACROS:
        page.add(("" if len(name) == 2 and name not in ("SB", "SM") else " ").join(arguments(rest)))
    elif name in BREAK_MACROS:
        if not (name == "TQ" and page.tag_lines):
            page.flush()
        if name in ("TP", "TQ"):
            page.tag_lines = 1
        elif name == "IP":
            _item(page, arguments(rest))
    elif name in ("nf", "EX", "fi", "EE"):
        page.flush()
        page.filled = name in ("fi", "EE")
    elif name in ("UE", "ME") and page.words and rest:
        page.words[-1] += unescape(rest)
    elif name in ("TS", "EQ", "ig", "de", "am"):
        return {"TS": r"\.TE", "EQ": r"\.EN"}.get(name, r"\.\.$")
    elif name in ("if", "ie", "el") and rest.rstrip().endswith("\\{"):
        return r".*\\\}"
    return ""


def _item(page: _Page, words: list[str]) -> None:
    tag = unescape(words[0]).strip() if words else ""
    if tag in ("•", "-", "*", "o", "+") or re.fullmatch(r"[(\[]?[\dа-яa-z]{1,2}[.)\]]?", tag):
        page.words.append("-" if tag in ("•", "*", "o", "+") else tag)
    elif tag:
        page.words.append(tag)
        page.flush()


def _join(blocks: list[str]) -> str:
    """Blank lines around paragraphs; a short tag stays with the text that follows it."""
    lines: list[str] = []
    for block in blocks:
        follows_tag = bool(lines) and 0 < len(lines[-1]) <= SHORT and not block.startswith("\f")
        is_short = len(block) <= SHORT and not block.startswith("\f")
        if not follows_tag and (not is_short or (lines and len(lines[-1]) > SHORT)):
            lines.append("")
        lines.append(block)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
