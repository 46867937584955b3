"""Names of metrics as MLflow takes them, and back.

MLflow takes letters, digits, `_`, `-`, `.`, `/`, `:` and spaces. `=` becomes `:`, so `kl/language=ru` is
`kl/language:ru`. Any other character, `:` and space among them, becomes its code point in hexadecimal between two
spaces; so do the parts of a path that a file system would take for something else.
"""

import itertools
import re

MOST = 250  # characters of a name
_TAKEN = re.compile(r"[\w\-./=]")
_ENCODED = re.compile(r" ([0-9a-f]+) |(:)")


def encoded(name: str) -> str:
    """The name in MLflow, of whatever length."""
    plain = "".join(character if _TAKEN.match(character) else _hex(character) for character in name)
    parts = plain.replace("=", ":").split("/")
    return _joined([_hex(".") + part[1:] if part == "." or part.startswith("..") else part for part in parts])


def decoded(name: str) -> str:
    """The name that `encoded` was given."""
    return _ENCODED.sub(lambda match: "=" if match[2] else chr(int(match[1], 16)), name)


def _joined(parts: list[str]) -> str:
    """Joins with `/`, encoded where it begins or ends the name, or follows another."""
    name = parts[0]
    for before, part in itertools.pairwise(parts):
        name += ("/" if before and part else _hex("/")) + part
    return name


def _hex(character: str) -> str:
    return f" {ord(character):x} "
