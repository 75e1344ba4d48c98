"""Tables of tasks: one per protocol, and never two protocols in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeprune.cli import output


def print_tasks(tasks: Mapping[str, Any], protocols: Mapping[str, Any]) -> None:
    """The sections ``tasks`` and ``protocols`` of an evaluation."""
    plain = {name: entry for name, entry in tasks.items() if entry["protocol"] is None}
    if plain:
        output.print_rows("tasks", [_row(name, entry) for name, entry in plain.items()])
        _notes(plain)
    for name, protocol in protocols.items():
        own = {key.partition("/")[2]: tasks[key] for key in protocol["tasks"]}
        rows = [_row(task, entry) for task, entry in own.items()]
        if protocol["mean"] is not None:
            rows.append(_mean(rows[0], protocol["mean"]))
        if rows:
            output.print_rows(f"{name} ({protocol['source']}), {protocol['shots']}-shot", rows)
        _notes(own)
        for task, reason in protocol["left_out"].items():
            output.OUT.print(f"left out: {task}: {reason}", markup=False, soft_wrap=True)
        if protocol["mean"] is None:
            output.OUT.print(f"no mean of {name}: not all of its tasks ran", markup=False)


def _row(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "task": name,
        "metric": f"{entry['metric']}, {entry['shots']}-shot",
        "questions": str(entry["items"]),
        "model": number(entry["value"]) + between(entry["low"], entry["high"]),
    }
    if entry["teacher"] is not None:
        gap = entry["difference"]
        found["teacher"] = number(entry["teacher"])
        found["difference"] = "–" if gap is None else signed(gap)
        found["p"] = "–" if entry["p"] is None else f"{entry['p']:.2g}"
        found["verdict"] = entry["verdict"] or "–"
    return found


def sample_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each result of a run on the BLiMP sample, beside the first, which is the original."""
    found = []
    for row in rows:
        entry = row["tasks"]["blimp_sample"]
        gap = entry["difference"]
        found.append(
            {
                "model": str(row["name"]),
                "questions": str(entry["items"]),
                "right": number(entry["value"]) + between(entry["low"], entry["high"]),
                "difference": "–" if gap is None else signed(gap),
                "verdict": entry["verdict"] or "–",
            }
        )
    return found


def _mean(like: Mapping[str, str], mean: Mapping[str, Any]) -> dict[str, str]:
    known = {
        "task": "mean",
        "model": number(mean["value"]) + between(mean["low"], mean["high"]),
    }
    if mean["teacher"] is not None:
        known |= {"teacher": number(mean["teacher"]), "difference": signed(mean["difference"])}
    return {key: known.get(key, "") for key in like}


def _notes(entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        if entry["cut"]:
            output.OUT.print(
                f"{name}: {entry['cut']} of {entry['items']} prompts are longer than the model "
                "reads and lost their beginning",
                soft_wrap=True,
            )
    for note in dict.fromkeys(note for entry in entries.values() for note in entry["notes"]):
        output.OUT.print(note, markup=False, soft_wrap=True)


def signed(gap: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    return f"{gap['value']:+.3f}" + between(gap["low"], gap["high"], "+.3f")


def number(value: float) -> str:
    """A score, or a perplexity."""
    return f"{value:.3f}" if value < 10 else f"{value:.4g}"


def between(low: float | None, high: float | None, form: str = ".3f") -> str:
    """An interval, or nothing where there is none."""
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
