"""The commands that would make a checkpoint again, spelled from what its record says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from moeprune.core.method import make_method
from moeprune.core.plan import Plan
from moeprune.errors import MoepruneError
from moeprune.models.attached import KEEP_PRUNED
from moeprune.models.data import demo_text, shares
from moeprune.models.editing import Writing

OUT = "OUT"
"""Stands for the output, ``FILE`` for a text: a record does not know where they lie."""


def repeat_command(plan: Plan, writing: Writing = Writing()) -> str:
    """``moeprune prune`` with what a plan was made with; a plan edited by hand has no command.

    Only options that are not the method's defaults are spelled out. Domains of text are named, and
    their SHA-256 in the record tells whether a text is the same.
    """
    words = ["moeprune", "prune", str(plan.model.get("name", "MODEL")), "--method", plan.method]
    words += _budget(plan.budget)
    known = _defaults(plan.method)
    for name, value in sorted(plan.options.items()):
        if value is not None if name not in known else value != known[name]:
            words += ["-o", f"{name}={_spelled(value)}"]
    words += text_words(plan.statistics.get("data"))
    words += ["--seed", str(plan.seed)] if plan.seed else []
    words += ["--dtype", plan.statistics["dtype"]] if "dtype" in plan.statistics else []
    words += ["--pad"] * writing.pad + ["--dequantize"] * writing.dequantize
    words += ["--mtp", writing.mtp] if writing.mtp != KEEP_PRUNED else []
    return shlex.join([*words, "--out", OUT])


_WHOLE_ONLY = ("ce_weight", "kl_weight", "accumulate", "rank")
"""Options of recovery that have a value always, and are refused layer by layer."""


def recover_command(told: Mapping[str, Any]) -> str:
    """``moeprune recover`` with the options of one recovery of a record."""
    options = told.get("options")
    options = dict(options) if isinstance(options, Mapping) else {}
    words = ["moeprune", "recover", "STUDENT", "--how", str(told.get("how"))]
    if told.get("teacher") is not None:
        words += ["--teacher", str(told["teacher"])]
    words += text_words(told.get("data"))
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name in ("how", "alpha", "dropout", "neftune") or value is False or value is None:
            continue  # the last three belong to presets
        if options.get("layerwise") and name in _WHOLE_ONLY:
            continue
        if value is True:
            words.append(flag)
        else:
            words += [flag, _listed(value)]
    return shlex.join([*words, "--out", OUT])


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def text_words(data: Any) -> list[str]:
    """The options that choose calibration text; none where nothing was read.

    The embedded text needs no ``--data``. Where domains did not give equally, be it by weights or
    because one was short, their numbers of sequences are the weights that draw the same again.
    """
    if not isinstance(data, Mapping) or "sequences" not in data:
        return []
    domains, total = data.get("domains"), data["sequences"]
    read = dict(domains) if isinstance(domains, Mapping) else {}
    embedded, mix = demo_text("calibration"), data.get("mix")
    plain = read in ({}, _equally(embedded, total), _equally(read, total))
    words: list[str] = []
    if read != _equally(embedded, total) and set(read) != set(embedded):
        words = [word for name in read for word in ("--data", f"{name}=FILE")]
    weights = mix if isinstance(mix, Mapping) else {} if plain else read
    if weights:
        words += ["--mix", ",".join(f"{name}={weight}" for name, weight in weights.items())]
    return [*words, "--sequences", str(total), "--length", str(data.get("length"))]


def _equally(names: Iterable[str], total: Any) -> dict[str, int]:
    """What is read of each domain if nothing else is said."""
    found = list(names)
    counts = shares(found, total, {}) if found and isinstance(total, int) else []
    return {name: count for name, count in zip(found, counts, strict=False) if count}


def _defaults(method: str) -> dict[str, Any]:
    try:
        return make_method(method).options()
    except MoepruneError:  # a method that is not installed here, or cannot do without options
        return {}


def _budget(budget: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    target = [key for key in ("target_bytes", "target_params") if key in budget]
    for key in target or ("ratio", "keep", "tau", "pattern"):
        if key in budget:
            words += ["--" + key.replace("_", "-"), str(budget[key])]
    if "multiple_of" in budget:
        words += ["--multiple-of", str(budget["multiple_of"])]
    words += ["--uniform"] * ("uniform" in budget)
    for key, flag in (("pinned", "--pin"), ("forbidden", "--forbid")):
        fixed = budget.get(key)
        for layer, ids in fixed.items() if isinstance(fixed, Mapping) else ():
            words += [flag, f"{layer}:{','.join(map(str, ids))}"]
    return words + ["--protect-super"] * ("protected" in budget)


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
