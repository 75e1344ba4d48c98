"""The measured part of a model card: an evaluation (``moeprune.evaluation/1``) as Markdown.

It is drawn from what is there: sections and intervals that were not measured are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moeprune.markdown import count, line

_DASH = "–"


def measured_text(result: Mapping[str, Any]) -> str:
    """Tables and sentences; times are left out, so that the same evaluation is the same text."""
    teacher = result.get("teacher")
    beside = f" beside `{line(teacher)}`" if teacher else ""
    parts = [
        f"Measured{beside} in {line(result.get('dtype'))}, on {_text(result.get('data'))}",
        _perplexity(result),
        _list(result.get("findings")),
        _generation(result.get("generation")),
        _efficiency(result.get("efficiency")),
        _tasks(result.get("tasks")),
    ]
    return "\n\n".join(part for part in parts if part)


def _text(data: Any) -> str:
    if not isinstance(data, Mapping):
        return "held-out text."
    return (
        f"{count(data.get('tokens'))} tokens of held-out text in windows of "
        f"{line(data.get('length'))} (SHA-256 `{line(data.get('hash'))}`)."
    )


def _perplexity(result: Mapping[str, Any]) -> str:
    rows = [*result.get("domains", {}).items()]
    rows += [(f"[{name}]", group) for name, group in result.get("groups", {}).items()]
    judged = any("against" in row for _, row in rows)
    head = ["text", "tokens", "perplexity"]
    head += ["KL, nats", "same first token"] if result.get("teacher") else []
    head += ["loss, difference", "verdict"] if judged else []
    lines = []
    for name, row in rows:
        against = row.get("against", {})
        cells = [line(name), count(row.get("tokens")), _number(row.get("perplexity"), ".2f")]
        if result.get("teacher"):
            cells.append(_with(row.get("kl"), against.get("kl"), ".4f"))
            cells.append(_with(row.get("agreement"), against.get("agreement"), ".1%"))
        if judged:
            cells += [_interval(against.get("loss"), "+.4f"), line(against.get("verdict", _DASH))]
        lines.append(cells)
    return _table(head, lines)


def _generation(section: Any) -> str:
    if not isinstance(section, Mapping):
        return ""
    parts = [
        "### Generation",
        f"{count(section.get('prompts'))} prompts, at most {count(section.get('new_tokens'))} "
        f"new tokens, seed {line(section.get('seed'))}.",
    ]
    for decoding in section.get("decodings", ()):
        rows = [
            [
                line(name).replace("_", "-"),
                _interval(cell.get("model"), ".3g"),
                _interval(cell.get("teacher"), ".3g"),
                _interval(cell.get("against"), "+.3g"),
            ]
            for name, cell in decoding.get("measures", {}).items()
        ]
        head = [line(decoding.get("name")), "model", "teacher", "difference"]
        parts.append(_table(head, rows))
        never, changed = decoding.get("never_ending"), decoding.get("changed")
        if never and changed:
            parts.append(
                f"Never-ending answers: {line(never.get('verdict'))}. "
                f"Answers that changed: {_number(changed.get('share'), '.1%')}, after "
                f"{_number(changed.get('after_tokens_median'), '.0f')} tokens in the median."
            )
    return "\n\n".join([*parts, _list(section.get("findings"))])


SIZES = (
    ("disk_bytes", "bytes on disk", "count"),
    ("memory_bytes", "bytes of weights in memory", "count"),
    ("peak_bytes", "bytes at the peak", "count"),
    ("parameters", "parameters", "count"),
    ("active_parameters", "active per token, at most", "count"),
    ("prefill_tokens_per_second", "prefill, tokens per second", ".1f"),
    ("decode_tokens_per_second", "decode, tokens per second", ".1f"),
    ("joules_per_token", "joules per new token", ".3g"),
)
"""Key of a model under ``efficiency``, in words, and how it is written."""


def _efficiency(section: Any) -> str:
    if not isinstance(section, Mapping):
        return ""
    models, place = section.get("models", {}), section.get("machine", {})
    names = [name for name in ("model", "teacher") if name in models]
    rows = [
        [words, *(_number(models[name].get(key), form) for name in names)]
        for key, words, form in SIZES
    ]
    where = (
        f"On {line(place.get('device'))} ({line(place.get('name'))}, "
        f"{line(place.get('threads'))} threads) in {line(section.get('dtype'))}, by "
        f"{line(section.get('engine'))}. Energy: {line(section.get('energy'))}."
    )
    parts = ["### Efficiency", where, _table(["", *names], rows), _list(section.get("findings"))]
    return "\n\n".join(part for part in parts if part)


def _tasks(section: Any) -> str:
    """A table for each protocol: two of them are never in one table."""
    if not isinstance(section, Mapping) or not section:
        return ""
    tables: dict[str, list[list[str]]] = {}
    for name, entry in section.items():
        if not isinstance(entry, Mapping):
            continue
        gap = entry.get("difference")
        tables.setdefault(str(entry.get("protocol") or "tasks"), []).append(
            [
                line(name),
                line(entry.get("metric")),
                count(entry.get("shots")),
                count(entry.get("items")),
                _interval(entry, ".3f"),
                _number(entry.get("teacher"), ".3f"),
                _interval(gap, "+.3f"),
                line(entry.get("verdict") or _DASH),
            ]
        )
    head = ["", "metric", "shots", "questions", "model", "teacher", "difference", "verdict"]
    parts = [_table([line(name), *head[1:]], rows) for name, rows in tables.items()]
    return "\n\n".join(["### Tasks", *parts])


def _with(value: Any, interval: Any, form: str) -> str:
    return _interval(interval, form) if isinstance(interval, Mapping) else _number(value, form)


def _interval(found: Any, form: str) -> str:
    if not isinstance(found, Mapping):
        return _DASH
    said = _number(found.get("value"), form)
    if found.get("low") is None or found.get("high") is None:
        return said
    return f"{said} ({_number(found['low'], form)} to {_number(found['high'], form)})"


def _number(value: Any, form: str) -> str:
    if not isinstance(value, (int, float)):
        return _DASH
    return count(value) if form == "count" else format(value, form)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _list(found: Any) -> str:
    return "\n".join(f"- {line(text, 500)}" for text in found) if isinstance(found, list) else ""
