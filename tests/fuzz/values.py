"""Hypothesis strategies for what a hostile file may hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**15, 10**400, -(2**63)]
    ),
    st.integers(-5, 300),
    st.sampled_from([0.0, -0.5, 0.5, 1.0, 2.5, 1e15, 1e308, float("inf"), float("nan")]),
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a\0b",
            "\ud800",
            "\u202e",
            "a\nb",
            "٣",
            "x" * 5000,
        ]
    ),
    st.text(max_size=8),
)
LEAVES = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none())
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def spelled(value: Any) -> bytes:
    """JSON as Python writes it, with what JSON does not have."""
    return json.dumps(value).encode()


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value[:3]):
            yield from paths(part, (*path, index))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another one at ``path``."""
    if not path:
        return new
    value = copy.deepcopy(value)
    part = value
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = new
    return value


def without(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy of a JSON value without what is at ``path``."""
    value = copy.deepcopy(value)
    part = value
    for step in path[:-1]:
        part = part[step]
    del part[path[-1]]
    return value


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value of which one or two parts are something else, or missing."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(sorted(paths(value), key=repr)))
        if path and draw(st.integers(0, 5)) == 0:
            value = without(value, path)
        else:
            value = replaced(value, path, draw(JSON))
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which some are changed, cut off, repeated or added."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat"]))
        if kind == "flip" and content:
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + draw(st.binary(max_size=9)) + content[at:]
        else:
            content = content[:at] + content[at : at + 40] + content[at:]
    return content
