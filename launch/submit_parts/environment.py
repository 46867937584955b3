"""The environment of training processes: a table with reasons, and what the user adds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tlite_jax.config import Section
from tlite_jax.config_files import parse, read_yaml
from tlite_jax.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"


class Variable(Section):
    """One row of the table."""

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    value: str
    nodes: str = Field(description="all, gpu, or the beginning of a hardware's name")
    reason: str


class _Table(Section):
    rows: tuple[Variable, ...]


@dataclass(frozen=True)
class Processes:
    """What is started.

    Attributes:
      nodes, per_node: hosts, and processes on each.
      gpus_per_node: 0 for nodes without GPUs.
      hardware: a name in configs/hardware, or a file.
      variables: the environment, in the table's order and the user's.
    """

    nodes: int
    per_node: int
    gpus_per_node: int
    hardware: str
    variables: tuple[Variable, ...]


def make_environment(gpus_per_node: int, hardware: str, extra: Sequence[str]) -> tuple[Variable, ...]:
    """The rows of the table that these nodes want, then the user's `NAME=VALUE` words, which replace them.

    Raises:
      UserError: a word that is not NAME=VALUE, or whose value no environment can hold.
    """
    file = TEMPLATES / "environment.yaml"
    table = parse(_Table, {"rows": read_yaml(file.read_text(encoding="utf-8"), str(file))}, str(file)).rows
    wanted = {"all", "gpu"} if gpus_per_node else {"all"}
    found = {
        row.name: row
        for row in table
        if row.nodes in wanted or (gpus_per_node and row.nodes not in ("all", "gpu") and hardware.startswith(row.nodes))
    }
    for word in extra:
        name, separator, value = word.partition("=")
        if not separator or not re.fullmatch(_NAME, name):
            raise UserError(f"--env {word!r} is not of the form NAME=VALUE")
        if not _printable(value):
            raise UserError(f"--env {name}: the value holds a control character")
        found.pop(name, None)
        found[name] = Variable(name=name, value=value, nodes="all", reason="asked for with --env")
    return tuple(found.values())


def checked(option: str, value: str, pattern: str, what: str) -> str:
    """The value, if it looks as the option's do; neither Slurm nor Kubernetes takes quotes everywhere.

    Raises:
      UserError: it does not.
    """
    if not re.fullmatch(pattern, value):
        raise UserError(f"{option} {value!r} is not {what}")
    return value


def checked_path(option: str, path: Path | str) -> str:
    """A path that survives a #SBATCH line: blanks are fine, quotes, backslashes and line ends are not.

    Raises:
      UserError: it has one.
    """
    text = str(path)
    if not _printable(text) or set(text) & set("\"'\\"):
        raise UserError(f"{option} {text!r}: Slurm cannot take a path with quotes, backslashes or control characters")
    return text


def _printable(text: str) -> bool:
    return all(character.isprintable() for character in text)
