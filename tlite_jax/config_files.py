"""Reading and writing configs: YAML, dotted overrides, and errors that name field, value and mend."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tlite_jax.config import RunConfig, Section
from tlite_jax.errors import UserError

_MOST_PROBLEMS = 10  # in one line
SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-5 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str, origin: str) -> Any:
    """Parses YAML without tags, aliases excepted.

    Raises:
      UserError: on malformed YAML, any tag, a repeated key.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{origin}{place}: {getattr(error, 'problem', None) or 'not YAML'}") from error


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's config from YAML and applies `section.field=value` overrides, whose values are YAML too.

    Raises:
      UserError: missing or malformed file, unknown key, wrong type or value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read config {path}: {reason}") from error
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is {type(values).__name__}")
    return parse(RunConfig, _overridden(values, overrides), origin=str(path))


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Returns the config with dotted overrides applied, validated again."""
    return parse(RunConfig, _overridden(config.model_dump(mode="json"), overrides), origin="override")


def parse(section: type[SectionT], values: Mapping[str, Any], origin: str) -> SectionT:
    """Validates a mapping; its problems are named in one UserError."""
    try:
        return section.model_validate_json(json.dumps(values))
    except ValidationError as error:
        told: set[tuple[Any, ...]] = set()
        lines = [_explain(section, problem, origin, told) for problem in error.errors()]
        more = f"; and {len(lines) - _MOST_PROBLEMS} more" if len(lines) > _MOST_PROBLEMS else ""
        raise UserError("; ".join(lines[:_MOST_PROBLEMS]) + more) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}: {error}") from error


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the config, resolved, as YAML that `load_config` reads back to an equal value."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the fields that differ as `field: old -> new`, nested fields by their dotted names."""
    lines = []
    for key in sorted({*old, *new}):
        name, before, after = prefix + key, old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{name}.")
        elif before != after or type(before) is not type(after):
            lines.append(f"{name}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def _overridden(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    result = json.loads(json.dumps(values, default=str))
    for word in overrides:
        name, separator, text = word.partition("=")
        if not separator or not name:
            raise UserError(f"override {word!r} is not of the form section.field=value")
        *parents, field = name.split(".")
        place = result
        for parent in parents:
            child = place.setdefault(parent, {})
            if child is None:
                child = place[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"override {word!r}: {parent!r} has no fields")
            place = child
        place[field] = read_yaml(text, f"override {word!r}")
    return result


def _explain(section: type[BaseModel], problem: Mapping[str, Any], origin: str, told: set[tuple[Any, ...]]) -> str:
    """One problem in words; `told` are the places whose keys have been listed already."""
    location = [part for part in problem["loc"] if not (isinstance(part, str) and "[" in part)]
    name = ".".join(str(part) for part in location) or "config"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(section, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        if close:
            return f"{origin}: {name}: unknown key; did you mean {close[0]!r}?"
        mend = "" if tuple(location[:-1]) in told else f"; known here: {', '.join(sorted(known))}"
        told.add(tuple(location[:-1]))
        return f"{origin}: {name}: unknown key{mend}"
    if problem["type"] == "missing":
        return f"{origin}: {name}: required, not given"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, dict | list) else f" (got {value!r})"
    return f"{origin}: {name}: {message}{shown}"


def _fields_at(section: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The field names of the section that a validation error's location leads to."""
    current: Any = section
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _section_in(current.model_fields[part].annotation)
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _section_in(annotation: Any) -> Any:
    """The Section inside an annotation such as `tuple[Section, ...] | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for argument in typing.get_args(annotation):
            found = _section_in(argument)
            if found is not None:
                return found
        return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
