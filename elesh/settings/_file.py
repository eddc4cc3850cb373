"""A settings file as values and as YAML nodes, so that every error names file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .masking import masked_repr

_QUOTED = re.compile(r"'[^']{3,}'")


class SettingsError(Exception):
    """A settings file or variable that cannot be used; says where, what and what to do."""


def read_block(path: Path) -> tuple[yaml.Node | None, dict[str, Any]]:
    """The mapping under ``elesh`` of a YAML file, as a node (with line numbers) and as values."""
    try:
        text = path.read_text(encoding="utf-8")
        root, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is not YAML: {_why(error)}") from None
    except RecursionError:
        raise SettingsError(f"{path}: is nested too deeply, or an alias holds itself") from None
    if values is None:
        return None, {}
    if not isinstance(values, dict) or set(values) != {"elesh"}:
        found = sorted(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise SettingsError(f"{path}:1: expected one top-level key 'elesh', found {found}")
    _check_keys(path, root, (), set())
    block = values["elesh"] or {}
    if not isinstance(block, dict):
        raise SettingsError(f"{path}:1: elesh: expected a mapping, found {type(block).__name__}")
    return _child(root, "elesh"), block


def _why(error: Exception) -> str:
    """What is wrong and where, without the text of the file: a secret may stand there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark, problem = error.problem_mark, _QUOTED.sub("'...'", str(error.problem))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _check_keys(
    path: Path, node: yaml.Node | None, section: tuple[str, ...], visited: set[int]
) -> None:
    """Refuse keys that are no text and keys that a section has twice (YAML keeps the last)."""
    if not isinstance(node, yaml.MappingNode) or id(node) in visited:
        return
    visited.add(id(node))  # aliases may make a node part of many, even of itself
    seen: set[str] = set()
    for key, value in node.value:
        name = ".".join((*section[1:], str(key.value)))
        where = f"{path}:{key.start_mark.line + 1}: {name}"
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise SettingsError(f"{where}: a key must be text, found {key.tag.rpartition(':')[2]}")
        if key.value in seen:
            raise SettingsError(f"{where}: is given twice in one section")
        seen.add(key.value)
        _check_keys(path, value, (*section, key.value), visited)


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return value  # type: ignore[no-any-return]
    return None


def _line(node: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    """The line of the deepest key of ``location`` that the file has."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for name, _ in node.value:
                if name.value == str(part):
                    line = name.start_mark.line + 1
        node = _child(node, str(part))
    return line


def explain(
    kind: type[BaseModel],
    error: ValidationError,
    layers: Mapping[str, Mapping[str, Any]],
    path: str | Path | None,
    node: yaml.Node | None,
) -> str:
    """One line a complaint: where it stands, key, what is wrong, and the nearest known key.

    ``layers`` are the values that lie over the file's, by the name of their source, topmost first.
    """
    lines = []
    for item in error.errors(include_url=False):
        place = item["loc"]
        line = _line(node, place)
        source = f"{path}:{line}" if line else next(iter(layers))
        source = next((name for name, values in layers.items() if _has(values, place)), source)
        text = item["msg"].removeprefix("Value error, ")
        near = _suggestion(kind, place) if item["type"] == "extra_forbidden" else ""
        if item["type"] == "extra_forbidden":
            text = f"unknown key{near}"
        key = ".".join(map(str, place))
        # A misspelt secret is one, too: the suggestion counts as the name.
        found = masked_repr(item.get("input"), f"{place[-1] if place else ''} {near}")
        lines.append(f"{source}: {key}: {text}, found {found}")
    return "\n".join(lines)


def _has(values: Any, location: tuple[int | str, ...]) -> bool:
    """Whether a layer sets the value of ``location``, or the part of a section that is at fault."""
    for part in location:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _suggestion(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section: Any = kind
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = field.annotation if field is not None else BaseModel
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
