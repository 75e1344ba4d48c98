"""YAML with the line of every value, so that a mistake can be pointed at.

Scalars are read as YAML 1.2 does: ``2:4`` is text and not 124, ``2e-5`` is a number, ``no`` is
text. A name that stands twice in a mapping, and aliases, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from moeprune.errors import MoepruneError

Place = tuple[str | int, ...]
_DEPTH = 20


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no annotations
    """Scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first
    )


@dataclass(frozen=True)
class Lines:
    """A document and where its values stand."""

    value: Any
    lines: Mapping[Place, int]

    def line(self, place: Place) -> int:
        """The line of a value, or of what is around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def parse(text: str, where: str) -> Lines:
    """Read one document.

    Raises:
        MoepruneError: it is not YAML, or not of the kind that is read here; with the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        value = None if node is None else _Reader(loader, lines, where).read(node, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:120]
        raise MoepruneError(f"{where}{line}: not YAML: {problem}") from error
    except RecursionError:
        raise MoepruneError(f"{where}: nested too deeply") from None
    return Lines(value, lines)


class _Reader:
    def __init__(self, loader: _Loader, lines: dict[Place, int], where: str) -> None:
        self._loader, self._lines, self._where = loader, lines, where
        self._seen: set[int] = set()

    def read(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        if id(node) in self._seen or len(place) > _DEPTH:
            raise MoepruneError(f"{self._where}, line {line}: aliases and deep nests are not read")
        self._seen.add(id(node))
        self._lines[place] = line
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                if key in found:
                    raise MoepruneError(
                        f"{self._where}, line {key_node.start_mark.line + 1}: {key!r} stands twice"
                    )
                found[key] = self.read(value_node, (*place, key))
                self._lines[(*place, key)] = key_node.start_mark.line + 1
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*place, i)) for i, item in enumerate(node.value)]
        try:
            return _scalar(node)
        except ValueError as error:
            raise MoepruneError(f"{self._where}, line {line}: {error}") from None


def _scalar(node: yaml.Node) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    if kind == "null":
        return None
    if kind != "str":
        raise ValueError(f"tags such as {node.tag!r} are not read")
    return text
