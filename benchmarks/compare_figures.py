"""Writes docs/compare.md and docs/compare.svg from a run of ``moeprune compare``.

python benchmarks/compare_figures.py compare-out

Everything in the text is read off the figures of that run; nothing is claimed about any other.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import arguments

from moeprune.report import pareto, wording
from moeprune.report.arena import COLUMNS, measured, original_cells, refusals, render, title
from moeprune.report.arena import cells_of as line_of

DOCS = Path(__file__).parent.parent / "docs"
MAKE = "moeprune compare demo --methods all --ratios 0.25,0.5,0.75 --patterns 2:4 --out compare-out"
FOUNDING = ("moe-pruner", "moeits", "mone")
CLASSES = ((0.0, 0.45), (0.45, 0.65), (0.65, 0.85), (0.85, 1.01))
SHOWN = tuple(name for name in COLUMNS if name not in ("layers", "of original", "parameters"))

HEAD = """\
# Methods compared

Made by `python benchmarks/compare_figures.py DIR` from the run of

```sh
{command}
```

{make}; do not edit. {model}: every plan from one calibration ({calibration}),
written to disk, and measured with the same evaluator on the same held-out windows ({windows}), in
{dtype}, together with the original. Perplexity, KL and agreement are the same on every run with the
same versions; seconds and memory are of this machine ({cores} cores, {machine}, torch {torch},
transformers {transformers}) and of this run, which took {seconds}.

The model is small: the figures compare methods on it, and say nothing about large models.

![bytes on disk against KL](compare.svg)

*removes* is what the ratio is a fraction of: half of the experts, half of the weights in every
expert and half of the layers are different things. *on disk* counts bytes; zeroed weights stay in
the file, save no memory and no time in mainstream servers, and are counted in *non-zero*.
KL is KL(original ‖ pruned) in nats per token, *agree* the share of positions at which both rank the
same token first.
"""


def table(columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def named(row: Mapping[str, Any]) -> str:
    return f"`{title(row)}`"


def said(row: Mapping[str, Any]) -> str:
    ratio = wording.times(row["perplexity_ratio"])
    return f"KL {wording.significant(row['kl'])}, perplexity {ratio}"


def classes(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Rows by bytes on disk, best first."""
    for low, high in CLASSES:
        found = [row for row in rows if low <= row["bytes_ratio"] < high and row["kl"] is not None]
        if found:
            name = f"{low:.0%} to {min(1.0, high):.0%} of the bytes"
            yield name, sorted(found, key=lambda row: row["kl"])


def best(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for name, found in classes(rows):
        first, rest = found[0], found[1:]
        text = (
            f"- **{name}** ({wording.plural(len(found), 'result')}): {named(first)}, {said(first)}"
        )
        if rest:
            text += f"; then {named(rest[0])} ({said(rest[0])})"
            text += f"; last {named(rest[-1])} ({said(rest[-1])})" if len(rest) > 1 else ""
        lines.append(text + ".")
    return "\n".join(lines) + "\n"


def founding(rows: Sequence[Mapping[str, Any]]) -> str:
    """Where the three methods that the package began with stand, and who beats them."""
    front = {title(rows[i]) for i in pareto.front(rows)}
    lines = []
    for name in FOUNDING:
        for row in rows:
            if row["name"] != name or row["kl"] is None:
                continue
            peers = next(found for _, found in classes(rows) if row in found)
            place = peers.index(row) + 1
            beats = [o for o in rows if o["kl"] is not None and o["bytes"] <= row["bytes"]
                     and o["kl"] < row["kl"]]  # fmt: skip
            text = f"- {named(row)}: {said(row)}; {place} of {len(peers)} in its size class"
            if title(row) in front:
                text += ", on the front"
            if beats:
                winner = min(beats, key=lambda o: o["kl"])
                text += (
                    f". Smaller or equal in bytes and closer to the original: "
                    f"{wording.plural(len(beats), 'result')}, the closest {named(winner)} "
                    f"({said(winner)})"
                )
            lines.append(text + ".")
    return "\n".join(lines) + "\n"


def page(result: Mapping[str, Any]) -> str:
    rows = measured(result)
    texts = list(result["calibrations"].values())
    heldout = result["heldout"]
    text = HEAD.format(
        command=result["command"],
        make="or both by `make compare`"
        if result["command"].removesuffix(" --json") == MAKE
        else "a shorter run than that of `make compare`",
        model=f"Model `{result['model']['name']}`",
        calibration="; ".join(
            f"{wording.whole(t['tokens'])} tokens of {len(t['domains'])} domains" for t in texts
        ) or "none",
        windows=f"{heldout['sequences']} of {heldout['length']} tokens, "
        f"{len(heldout['domains'])} domains",
        dtype=result["identity"]["dtype"],
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=result["versions"]["torch"],
        transformers=result["versions"]["transformers"],
        seconds=wording.seconds(result["seconds"]),
    )  # fmt: skip
    lines = [original_cells(result["original"]), *(line_of(row, result["texts"]) for row in rows)]
    whole = result["original"]["nonzero_parameters"]
    smaller = [row for row in rows if row["nonzero_parameters"] < whole]
    text += "\n## What it says\n\nBest by size:\n\n" + best(smaller)
    text += "\nThe three methods that this package began with:\n\n" + founding(smaller)
    idle = [named(row) for row in rows if row not in smaller]
    if idle:
        text += f"\nRounded to nothing, so not ranked: {', '.join(idle)}.\n"
    text += "\n## All results\n\n" + table(SHOWN, lines)
    refused = refusals(result)
    if refused:
        text += "\nNot possible:\n\n" + "\n".join(f"- {line}" for line in refused) + "\n"
    return text


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("compare-out"))
    folder = parser.parse_args().folder
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    _, picture = render(result)
    (DOCS / "compare.md").write_text(page(result), encoding="utf-8")
    (DOCS / "compare.svg").write_text(picture, encoding="utf-8")
    print(f"wrote {DOCS / 'compare.md'} and its picture: {len(measured(result))} results")


if __name__ == "__main__":
    main()
