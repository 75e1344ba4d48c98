"""The commands that would make a checkpoint again, spelled from what its record says."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from moeprune.core.method import make_method
from moeprune.core.plan import Plan
from moeprune.errors import MoepruneError
from moeprune.models.attached import KEEP_PRUNED
from moeprune.models.data import demo_text
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
    for name, value in sorted(plan.options.items()):
        if value != _defaults(plan.method).get(name, value is None):
            words += ["-o", f"{name}={_spelled(value)}"]
    words += text_words(plan.statistics.get("data"))
    words += ["--seed", str(plan.seed)] if plan.seed else []
    words += ["--dtype", plan.statistics["dtype"]] if "dtype" in plan.statistics else []
    words += ["--pad"] * writing.pad + ["--dequantize"] * writing.dequantize
    words += ["--mtp", writing.mtp] if writing.mtp != KEEP_PRUNED else []
    return shlex.join([*words, "--out", OUT])


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
        if value is True:
            words.append(flag)
        else:
            words += [flag, ",".join(value) if isinstance(value, (list, tuple)) else str(value)]
    return shlex.join([*words, "--out", OUT])


def text_words(data: Any) -> list[str]:
    """The options that choose calibration text; none where nothing was read."""
    if not isinstance(data, Mapping) or "sequences" not in data:
        return []
    domains = data.get("domains")
    names = list(domains) if isinstance(domains, Mapping) else []
    words: list[str] = []
    if set(names) != set(demo_text("calibration")):
        for name in names:
            words += ["--data", f"{name}=FILE"]
    if isinstance(data.get("mix"), Mapping):
        words += ["--mix", ",".join(f"{name}={weight}" for name, weight in data["mix"].items())]
    return [*words, "--sequences", str(data["sequences"]), "--length", str(data.get("length"))]


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
