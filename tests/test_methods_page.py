"""The table of all methods in docs/methods.md says what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

from moeprune.core.method import make_method, methods

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


def table() -> dict[str, list[str]]:
    """The cells of each method's row."""
    rows = {}
    section = PAGE.partition("## All methods")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            names, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            rows |= dict.fromkeys(re.findall(r"`([^`]+)`", names), cells)
    return rows


def test_every_method_has_a_row_with_its_source_and_needs() -> None:
    rows = table()
    assert rows.keys() == {name for name, kind in methods().items() if _ours(kind.__module__)}
    for name, (source, needs, removes, deviations) in rows.items():
        method = make_method(name)
        assert source == method.source, name
        assert set(needs.split(", ")) == (set(method.needs) or {"–"}), name
        assert removes, name
        assert deviations, name
        assert ("walks" in deviations.split(";")[0]) == method.sequential, name


def test_every_method_is_explained() -> None:
    explained = PAGE.partition("## All methods")[2].partition("\n## ")[2]
    assert [name for name in table() if f"`{name}`" not in explained] == []


def _ours(module: str) -> bool:
    return module.startswith("moeprune.methods.")
