"""HTML documentation to plain text, one paragraph a line."""

import re
from html.parser import HTMLParser

# fmt: off
VOID = frozenset(
    {
        "area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track",
        "wbr"
    }
)
DROPPED_ELEMENTS = frozenset(
    {
        "head", "script", "style", "nav", "header", "footer", "aside", "noscript", "button", "form",
        "select", "svg", "template"
    }
)
# Classes and ids of navigation in the documentation of DocBook, Sphinx and LibreOffice.
DROPPED_CLASSES = frozenset(
    {
        "navheader", "navfooter", "toc", "toctree-wrapper", "sphinxsidebar", "headerlink", "docnav",
        "howtoget", "footer", "list-of-tables", "list-of-figures", "list-of-examples", "index",
        "legalnotice", "authorgroup", "copyright", "revhistory", "footnotes", "relatedtopics", "related",
        "icontable", "MAC"
    }
)
BLOCKS = frozenset(
    {
        "p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "tr", "table", "section",
        "article", "pre", "blockquote", "ul", "ol", "dl", "br", "hr", "caption"
    }
)
HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
# fmt: on


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []  # kind (paragraph, heading, item, pre) and text
        self.pieces: list[str] = []
        self.link_depth = 0
        self.outside_links = False  # whether the paragraph has letters that are no link's text
        self.kind = "paragraph"
        self.skipped_tag, self.skipped_depth = "", 0
        self.pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_tag:
            self.skipped_depth += tag == self.skipped_tag
            return
        if tag not in VOID and self._is_dropped(tag, attrs):
            if tag in BLOCKS:
                self.flush()
            self.skipped_tag, self.skipped_depth = tag, 1
            return
        if tag in BLOCKS:
            self.flush()
            if tag in HEADINGS:
                self.kind = "heading"
            elif tag == "li":
                self.kind = "item"
            elif tag == "pre":
                self.pre_depth += 1
                self.kind = "pre"
        elif tag in ("td", "th"):
            self.pieces.append(" ")
        elif tag == "a":
            self.link_depth += any(name == "href" for name, _ in attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS and not self.skipped_tag:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_tag:
            self.skipped_depth -= tag == self.skipped_tag
            if not self.skipped_depth:
                self.skipped_tag = ""
        elif tag == "a":
            self.link_depth = 0
        elif tag in BLOCKS:
            self.flush()
            if tag == "pre":
                self.pre_depth = max(0, self.pre_depth - 1)
            self.kind = "pre" if self.pre_depth else "paragraph"

    def handle_data(self, data: str) -> None:
        if not self.skipped_tag:
            self.pieces.append(data)
            self.outside_links |= not self.link_depth and any(map(str.isalnum, data))

    def flush(self) -> None:
        text = "".join(self.pieces)
        text = text.strip("\n").rstrip() if self.pre_depth else " ".join(text.split())
        is_text = self.outside_links or self.kind == "heading"
        self.pieces, self.outside_links = [], False
        if is_text and text.strip():
            self.blocks.append((self.kind, text))
            self.kind = "pre" if self.pre_depth else "paragraph"

    @staticmethod
    def _is_dropped(tag: str, attrs: list[tuple[str, str | None]]) -> bool:
        if tag in DROPPED_ELEMENTS:
            return True
        values = {name: value or "" for name, value in attrs}
        names = {*values.get("class", "").split(), values.get("id", "")}
        return values.get("role") == "navigation" or not names.isdisjoint(DROPPED_CLASSES)


def html_to_text(source: str) -> str:
    """Converts one page.

    Args:
      source: HTML or XHTML. Scripts, styles, navigation (elements, roles, and the classes that DocBook, Sphinx and
        LibreOffice use for it) and paragraphs that are nothing but links are dropped.

    Returns:
      Plain text: a paragraph a line, blank lines between paragraphs, list items after a dash, a form feed before every
      heading.
    """
    reader = _Reader()
    reader.feed(source)
    reader.close()
    reader.flush()
    lines: list[str] = []
    previous = ""
    for kind, text in reader.blocks:
        if kind == "heading":
            lines += ["", "\f" + text.replace("¶", "").strip()]
        else:
            if not (previous == "heading" or kind == previous == "item"):
                lines.append("")
            lines.append(f"- {text}" if kind == "item" else text)
        previous = kind
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
