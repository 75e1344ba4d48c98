"""The text of a model card: what was done, what is left, how to open it, where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moeprune.markdown import count, line
from moeprune.models.repeat import recover_command

BEGIN, END = "<!-- moeprune: measured, begin -->", "<!-- moeprune: measured, end -->"
NOT_MEASURED = (
    "Not measured. `moeprune evaluate DIR --teacher ORIGINAL --card` measures it and writes here."
)
_LONGEST = 2000

_STOCK = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

It is a stock checkpoint: transformers opens it with its own classes, and vLLM loads it like the
original wherever it serves this architecture."""
_OWN = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`trust_remote_code=True` runs `modeling_moeprune.py` of this directory, which needs torch and
transformers only; `moeprune.load("DIR")` opens it without running files of the checkpoint. Without
either it fails loudly. vLLM: no, unless moeprune is installed beside it: its plugin serves such
layers of some families."""


def body(
    record: Mapping[str, Any],
    plan: Mapping[str, Any],
    method: Mapping[str, str],
    head: Mapping[str, Any],
    own_code: bool,
    base_card: str | None,
    licence: Mapping[str, str] | None,
) -> str:
    """Everything below the metadata block.

    Args:
        record, plan: moeprune.json and moeprune_plan.json.
        method: ``summary`` and ``source``.
        head: the metadata.
        own_code: whether it opens with code of its own.
        base_card: the file in which the original's card is kept.
        licence: ``license`` and the ``file`` that says so.
    """
    steps = _steps(record)
    original = _code(steps[0].get("base_name") or _name(record))
    trained = {told.get("after_steps", len(steps)) for told in trainings(record)}
    recovered = len(steps) in trained
    ways = ", then ".join(
        f"`{line(step.get('method'))}`" + ", trained again" * (number in trained - {len(steps)})
        for number, step in enumerate(steps, start=1)
    )
    sections = {
        "": f"{original} pruned by {ways}" + ", then trained again." * recovered
        + "." * (not recovered) + _hub(head),
        "What was done": _done(plan, method, steps),
        "Recovery": _recoveries(record),
        "Size": _sizes(record, steps),
        "What was lost": f"{BEGIN}\n{NOT_MEASURED}\n{END}",
        "How to open it": _OWN if own_code else _STOCK,
        "Limits": _limits(record, plan, recovered),
        "Licence": _licence(licence, base_card),
        "Where it came from": _origin(record, steps),
    }  # fmt: skip
    title = f"# {original.strip('`')}, pruned by {ways}\n"
    heads = {name: f"## {name}\n\n" if name else "" for name in sections}
    parts = [f"{heads[name]}{text}\n" for name, text in sections.items() if text]
    return "\n".join([title, *parts])


def _steps(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = record.get("steps")
    known = _mappings(steps)
    return known or [{**record, "base_name": _name(record)}]


def _mappings(found: object) -> list[Mapping[str, Any]]:
    """What is of our form in a list of a record, which may come from a stranger."""
    return [x for x in found if isinstance(x, Mapping)] if isinstance(found, list) else []


def trainings(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every recovery that a model went through, between its steps and after the last."""
    return _mappings(record.get("recovered"))


def _name(record: Mapping[str, Any]) -> str:
    base = record.get("base")
    return str(base.get("name", "a model")) if isinstance(base, Mapping) else "a model"


def _hub(head: Mapping[str, Any]) -> str:
    if "base_model" in head:
        return f" Base model: {_code(head['base_model'])}."
    return (
        " It did not come from a hub; before this is published, write the original's hub id as "
        "`base_model` into the block above."
    )


def _done(
    plan: Mapping[str, Any], method: Mapping[str, str], steps: list[Mapping[str, Any]]
) -> str:
    lines = []
    if method["summary"]:
        lines.append(f"- Method: {method['summary']} (source: {method['source']}).")
    if len(steps) > 1:
        lines.append(f"- {len(steps)} steps; what follows is of the last.")
    budget = steps[-1].get("budget")
    if isinstance(budget, Mapping) and budget:
        said = ", ".join(f"{k} {line(v)}" for k, v in budget.items() if not isinstance(v, Mapping))
        lines.append(f"- Asked for: {said}.")
    layers = plan.get("layers")
    entries = layers if isinstance(layers, Mapping) else {}
    lines += [f"- {text}" for text in _edits(entries.values())]
    if plan.get("drop_layers"):
        lines.append(f"- Decoder layers removed: {line(plan['drop_layers'])}.")
    data = steps[-1].get("statistics")
    read = data.get("data") if isinstance(data, Mapping) else None
    lines.append(f"- Calibration text: {_text(read)}")
    for warning in plan.get("warnings") or ():
        lines.append(f"- Warning: {line(warning)}.")
    return "\n".join(lines)


def _edits(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """What happened to experts, over all layers."""
    rows = list(layers)
    total = sum(_count(row.get("experts")) for row in rows)
    kept = [len(row.get("keep") or ()) for row in rows]
    replaced = sum(len(row.get("replaced") or ()) for row in rows)
    if not rows:
        return []
    each = f"{kept[0]} in each" if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)} in each"
    found = [f"Experts kept: {sum(kept)} of {total} in {len(rows)} layers ({each})."]
    gone = total - sum(kept) - replaced
    if replaced:
        found.append(f"Experts replaced by constants or small maps: {replaced}.")
    if gone:
        found.append(f"Experts deleted or merged into others: {gone}.")
    for key, words in (
        ("mask", "Weights zeroed inside experts, stored as zeros"),
        ("neurons", "Experts narrowed to fewer neurons"),
        ("served_by", "Experts that answer for others"),
        ("ranks", "Matrices cut to a lower rank"),
        ("stored", "Matrices that were computed anew"),
    ):
        number = sum(bool(row.get(key)) for row in rows)
        if number:
            found.append(f"{words}: in {number} layers.")
    return found


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _text(read: Any) -> str:
    if not isinstance(read, Mapping) or "tokens" not in read:
        return "none; the method reads weights only."
    domains = read.get("domains")
    names = ", ".join(map(line, domains)) if isinstance(domains, Mapping) else "unknown"
    return (
        f"{line(read['tokens'])} tokens in {line(read.get('sequences'))} sequences of "
        f"{line(read.get('length'))} ({names}); SHA-256 of the tokens `{line(read.get('hash'))}`."
    )


def _recoveries(record: Mapping[str, Any]) -> str:
    lines = []
    for told in trainings(record):
        held = told.get("held")
        gain = ""
        if isinstance(held, list) and len(held) == 2 and all(isinstance(x, float) for x in held):
            gain = f"; held-out {line(told.get('measure'))} {held[0]:.4f} → {held[1]:.4f}"
        layers = told.get("layers")
        form = f"weights of step {line(told.get('best_step'))}"
        if isinstance(layers, list) and layers:
            form = f"in {len(layers)} layers, one after another"
        lines.append(
            f"- `{line(told.get('how'))}`, teacher {_code(told.get('teacher'))}, "
            f"{line(told.get('steps'))} steps, {form}"
            f"{gain}. Text: {_text(told.get('data'))}"
        )
    return "\n".join(lines)


def _sizes(record: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> str:
    rows = ["| | original | this |", "|---|---|---|"]
    for key, name in (
        ("experts", "experts with weights"),
        ("parameters", "parameters"),
        ("nonzero_parameters", "of them not zero"),
        ("tensor_bytes", "bytes of all tensors"),
    ):
        before, after = steps[0].get(key), record.get(key)
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after) == 2:
            rows.append(f"| {name} | {count(before[0])} | {count(after[1])} |")
    return "\n".join(rows)


def _limits(record: Mapping[str, Any], plan: Mapping[str, Any], recovered: bool) -> str:
    lines = [
        "- What the original was bad at, this is not better at; its limits and biases remain.",
    ]
    if isinstance(record.get("statistics"), Mapping) and record["statistics"]:
        lines.append(
            "- Experts were judged on the calibration text above. Languages and subjects that are "
            "not in it may have lost more than any number here shows."
        )
    layers = plan.get("layers")
    entries = list(layers.values()) if isinstance(layers, Mapping) else []
    if any(entry.get("mask") for entry in entries if isinstance(entry, Mapping)):
        lines.append(
            "- Zeroed weights stay in the files: mainstream servers are not faster for them."
        )
    if not recovered:
        lines.append("- It was not trained after pruning.")
    lines.append("- Safety and refusals were not measured.")
    return "\n".join(lines)


def _licence(licence: Mapping[str, str] | None, base_card: str | None) -> str:
    if licence is None:
        said = "The original's files do not say under which licence it is; ask before publishing."
    else:
        said = (
            f"That of the original: {_code(licence['license'])}, as its {_code(licence['file'])} "
            "says. Licence files were copied."
        )
    return said + (
        f" The original's card is kept as [{base_card}]({base_card})." if base_card else ""
    )


def _origin(record: Mapping[str, Any], steps: list[Mapping[str, Any]]) -> str:
    lines = []
    for number, step in enumerate(steps, start=1):
        lead = f"Step {number}: " if len(steps) > 1 else ""
        lines += [
            f"- {lead}from a model of fingerprint `{line(step.get('base_fingerprint'))}`, "
            f"plan of SHA-256 `{line(step.get('plan_sha256'))}`, seed {line(step.get('seed'))}.",
        ]
        if step.get("command"):
            lines.append(f"  Again: {_command(str(step['command']))}")
    for told in trainings(record):
        lines.append(f"- Recovery again: {_command(recover_command(told))}")
    versions = record.get("versions")
    if isinstance(versions, Mapping):
        said = ", ".join(f"{line(name)} {line(value)}" for name, value in versions.items())
        lines.append(f"- Versions: {said}.")
    lines.append(
        "- The whole record is `moeprune.json`, the decision for every expert `moeprune_plan.json`."
    )
    return "\n".join(lines)


def _command(command: str) -> str:
    """A command as a code span; one that a span cannot hold whole is no command any more."""
    shown = line(command, _LONGEST)
    return f"`{shown}`" if shown == command else "the command does not fit here."


def _code(value: object) -> str:
    return f"`{line(value)}`"
