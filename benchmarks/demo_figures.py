"""Regenerates docs/demo.md: what `make demo` measures on the embedded model.

python benchmarks/demo_figures.py
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import arguments

from moeprune.pipeline.demo import demo

PAGE = Path(__file__).parent.parent / "docs" / "demo.md"

HEAD = """\
# What the demo measures

Made by `python benchmarks/demo_figures.py`; do not edit. `moeprune demo` calibrates the embedded
model once ({tokens} tokens of six domains), plans from that one pass, writes six checkpoints and
measures them on held-out text in float32. Sizes, perplexities, KL and agreement are the same on
every run with the same versions; seconds and memory are of this machine ({cores} cores,
{machine}, torch {torch}, transformers {transformers}) and of this run.

The reference model is small and weak: the table compares methods on it, and says nothing about how
a method does on a large model. Domains in *italics* were never seen in training or calibration.
"""

READING = """\
How to read it

- `mone-*` keeps half or a quarter of the experts and replaces the others by one vector each;
  `moeits-*` deletes them by their weights alone, without data; `moe-pruner-*` keeps all experts
  and zeroes half of their weights, which saves no byte of a dense file (see *non-zero*).
- KL is the mean divergence KL(original || pruned) of the next-token distribution in nats per token,
  agreement the share of positions at which both rank the same token first.
- MoE-Pruner is planned here with `propagate=dense`, so that one calibration serves all methods;
  its default prunes each layer before it observes the next.
- Warnings of the run: {warnings}
"""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1f}"


def sizes(rows: list[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any]) -> list[str]:
        seconds, peak = row["seconds"], row["peak_memory_bytes"]
        return [
            f"`{row['name']}`",
            str(row["experts"]),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['nonzero_parameters'] / 1e6:.2f} M",
            f"{row['bytes'] / 1e6:.1f} MB",
            "–" if row["kl"] is None else f"{row['kl']:.3f}",
            "–" if row["agreement"] is None else f"{row['agreement']:.1%}",
            "–" if "plan" not in seconds else f"{seconds['plan'] + seconds['apply']:.1f} s",
            f"{seconds['evaluate']:.1f} s",
            "–" if peak is None else f"{peak / 2**20:.0f} MiB",
        ]

    columns = (
        "model", "experts", "parameters", "non-zero", "on disk", "KL", "agreement",
        "plan and write", "walk over held-out text", "peak memory (plan, write)",
    )  # fmt: skip
    return table(columns, map(cells, rows))


def perplexities(rows: list[Mapping[str, Any]], seen: Iterable[str]) -> str:
    domains = list(rows[0]["perplexity"])
    columns = ["perplexity", *(d if d in set(seen) else f"*{d}*" for d in domains)]
    body = [[f"`{r['name']}`", *(number(r["perplexity"][d]) for d in domains)] for r in rows]
    return table(columns, body)


def main() -> None:
    arguments.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = demo(Path(folder) / "demo-out")
    rows = result["rows"]
    warnings = [f"{row['name']}: {text}" for row in rows for text in row["warnings"]]
    page = HEAD.format(
        tokens=result["calibration"]["tokens"],
        cores=os.cpu_count(),
        machine=platform.machine(),
        torch=result["versions"]["torch"],
        transformers=result["versions"]["transformers"],
    )
    page += "\n" + sizes(rows)
    page += "\n" + perplexities(rows, result["calibration"]["domains"])
    page += "\n" + READING.format(warnings="; ".join(warnings) or "none.")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE} in {result['seconds']} s of demo")


if __name__ == "__main__":
    main()
