"""Checks a run's JSON before anything is drawn, so that the rest of the report can rely on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeprune.errors import MoepruneError

FORMAT = "moeprune.run/1"

_Kinds = tuple[type, ...]
_NUMBER: _Kinds = (int, float, type(None))  # a measurement that failed may be null
_TEXT: _Kinds = (str,)
_TABLE: _Kinds = (Mapping,)
_LIST: _Kinds = (list, tuple)

_RUN: dict[str, _Kinds] = {
    "command": _TEXT,
    "model": _TABLE,
    "rows": _LIST,
    "warnings": _LIST,
    "versions": _TABLE,
    "seconds": _NUMBER,
}
_MODEL: dict[str, _Kinds] = {
    "name": _TEXT,
    "model_type": _TEXT,
    "moe_layers": _LIST,
    "experts": (int,),
    "top_k": (int,),
    "parameters": _NUMBER,
    "bytes": _NUMBER,
    "fingerprint": _TEXT,
}
_ROW: dict[str, _Kinds] = {
    "name": _TEXT,
    "method": (str, type(None)),
    "experts": _NUMBER,
    "experts_before": _NUMBER,
    "parameters": _NUMBER,
    "nonzero_parameters": _NUMBER,
    "bytes": _NUMBER,
    "perplexity": _TABLE,
    "seconds": _TABLE,
}
_ROW_OPTIONAL: dict[str, _Kinds] = {
    "budget": _TABLE,
    "options": _TABLE,
    "plan": _TABLE,
    "warnings": _LIST,
}
_LAYER: dict[str, _Kinds] = {"keep": _LIST, "replaced": _LIST, "dropped": _LIST}
_LAYER_OPTIONAL: dict[str, _Kinds] = {"scores": _TABLE, "notes": _LIST, "merged": _TABLE}


def check(result: Mapping[str, Any]) -> None:
    """Raise ``MoepruneError``, naming the key, unless the run has everything a report needs."""
    if not isinstance(result, Mapping) or result.get("format") != FORMAT:
        raise MoepruneError(
            f"report: 'format' is not {FORMAT!r}", "report on what --json printed or saved"
        )
    _require(result, _RUN, "report")
    _allow(result, {"calibration": _TABLE, "usage": _TABLE}, "report")
    _allow(result.get("calibration") or {}, {"domains": _TABLE}, "report: calibration")
    _require(result["model"], _MODEL, "report: model")
    for layer, shares in (result.get("usage") or {}).items():
        _check_layer_index(layer, "report: usage")
        if not isinstance(shares, _LIST):
            raise MoepruneError(f"report: usage.{layer!r} is not a list of shares")
    _check_atlas(result.get("atlas"), "report: atlas")
    if not result["rows"]:
        raise MoepruneError("report: 'rows' is empty", "the first row is the unpruned model")
    for index, row in enumerate(result["rows"]):
        _check_row(row, result["model"]["experts"], f"report: rows[{index}]")


def _check_atlas(atlas: Any, where: str) -> None:
    """Numbers where numbers are drawn; the page's script relies on it."""
    if atlas is None:
        return
    if not isinstance(atlas, Mapping):
        raise MoepruneError(f"{where} is not an object")
    _allow(atlas, {"domains": _LIST, "tokens": _LIST, "layers": _TABLE, "routing": _TABLE}, where)
    _allow(atlas.get("routing") or {}, {"rows": _TABLE}, f"{where}.routing")
    for name, by_layer in ((atlas.get("routing") or {}).get("rows") or {}).items():
        if not isinstance(by_layer, Mapping):
            raise MoepruneError(f"{where}.routing: {name!r} is not an object")
        for layer in by_layer:
            _check_layer_index(layer, f"{where}.routing")
    domains, tokens = len(atlas.get("domains") or ()), len(atlas.get("tokens") or ())
    for layer, entry in (atlas.get("layers") or {}).items():
        _check_layer_index(layer, f"{where}.layers")
        inside = f"{where}.layers.{layer}"
        if not isinstance(entry, Mapping):
            raise MoepruneError(f"{inside} is not an object")
        _allow(entry, dict.fromkeys(("count", "gate", "domains", "tokens"), _LIST), inside)
        well = all(_numbers(entry.get(name) or ()) for name in ("count", "gate"))
        well &= all(_numbers(part, domains) for part in entry.get("domains") or ())
        well &= all(
            isinstance(named, (list, tuple))
            and all(_numbers(one, 3) and one[0] in range(tokens) for one in named)
            for named in entry.get("tokens") or ()
        )
        if not well:
            raise MoepruneError(f"{inside} does not hold what an atlas counts")


def _numbers(values: Any, size: int | None = None) -> bool:
    """Whether these are numbers, and so many."""
    return (
        isinstance(values, (list, tuple))
        and size in (None, len(values))
        and all(type(value) in (int, float) for value in values)
    )


def _check_row(row: Any, experts: int, where: str) -> None:
    if not isinstance(row, Mapping):
        raise MoepruneError(f"{where} is not an object")
    _require(row, _ROW, where)
    _allow(row, _ROW_OPTIONAL, where)
    for layer, entry in (row.get("plan") or {}).items():
        _check_layer_index(layer, f"{where}: plan")
        inside = f"{where}: plan.{layer}"
        if not isinstance(entry, Mapping):
            raise MoepruneError(f"{inside} is not an object")
        _require(entry, _LAYER, inside)
        _allow(entry, _LAYER_OPTIONAL, inside)
        for old, into in (entry.get("merged") or {}).items():
            if not (str(old).isdecimal() and isinstance(into, _LIST)):
                raise MoepruneError(f"{inside}: 'merged' does not say into which experts")
        for name in _LAYER:
            if not all(type(e) is int and 0 <= e < experts for e in entry[name]):
                raise MoepruneError(f"{inside}: {name!r} is not a list of ids below {experts}")
        for name, values in (entry.get("scores") or {}).items():
            if not isinstance(values, _LIST):
                raise MoepruneError(f"{inside}: scores.{name} is not a list")


def _check_layer_index(key: Any, where: str) -> None:
    if not (isinstance(key, str) and key.isdecimal()):
        raise MoepruneError(f"{where}: {key!r} is not a layer index")


def _require(data: Mapping[str, Any], kinds: Mapping[str, _Kinds], where: str) -> None:
    for name in kinds:
        if name not in data:
            raise MoepruneError(f"{where}: {name!r} is missing")
        _check_kind(data[name], kinds[name], name, where)


def _allow(data: Mapping[str, Any], kinds: Mapping[str, _Kinds], where: str) -> None:
    for name, allowed in kinds.items():
        if data.get(name) is not None:
            _check_kind(data[name], allowed, name, where)


def _check_kind(value: Any, allowed: _Kinds, name: str, where: str) -> None:
    if not isinstance(value, allowed):
        raise MoepruneError(f"{where}: {name!r} may not be {type(value).__name__}")
