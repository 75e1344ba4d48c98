"""The page that ``run.py`` writes; what is not measured stands in ``serving.head.md``."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from compared import FLOAT32_TIE, LEAST, Compared

VERSIONS: dict[str, str] = {}
"""Of the environment with vLLM, as it said itself."""

STOCK = [
    "model", "experts", "computed in", "decisions agree", "whole continuations", "largest gap",
    "rounding", "log-probabilities", "unpruned agrees",
]  # fmt: skip

OWN = [
    "checkpoint", "experts stored", "computed in", "decisions agree", "whole continuations",
    "largest gap", "rounding", "expert parameters", "served",
]  # fmt: skip

WAY = ["served", "checkpoint", "decisions agree", "whole continuations", "log-probabilities"]

HELD = ["checkpoint", "experts in the files", "experts served", "process", "less than unpruned"]


def middle(values: Sequence[float]) -> float:
    """The upper median."""
    return sorted(values)[len(values) // 2]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _largest(values: Sequence[float]) -> str:
    return f"{max(values):.2g}" if math.isfinite(max(values)) else "unknown"


def _agreement(dtype: str, found: Compared) -> list[str]:
    return [
        dtype,
        f"{found.same} of {found.decisions} ({found.agreement:.1%})",
        f"{found.whole} of {found.continuations}",
        f"{max(found.gaps):.3f}" if found.gaps else "–",
        f"{middle(found.noise):.3f}, {max(found.noise):.3f}" if dtype == "bfloat16" else "–",
    ]


def stock_cells(name: str, facts: Mapping[str, Any], dtype: str, found: Compared) -> list[str]:
    """A row of the first table."""
    before, after = facts["experts"]
    return [
        name,
        f"{before} → {after}, top {facts['top_k']}",
        *_agreement(dtype, found),
        f"{middle(found.moved):.2g}, {_largest(found.moved)}",
        f"{sum(found.unpruned) / len(found.unpruned):.0%}",
    ]


def own_cells(
    name: str, facts: Mapping[str, Any], dtype: str, found: Compared, served: Mapping[str, Any]
) -> list[str]:
    """A row of the second table."""
    before, after = facts["expert_parameters"]
    return [
        name,
        facts["stored"],
        *_agreement(dtype, found),
        f"{before:,} → {after:,} ({after / before:.1%})",
        f"{served['expert_parameters']:,}",
    ]


def way_cells(name: str, found: Compared) -> list[str]:
    """What another way to serve gives, in float32."""
    _, decisions, whole, *_ = _agreement("float32", found)
    return [name, decisions, whole, f"{middle(found.moved):.2g}, {_largest(found.moved)}"]


def page(
    rows: Sequence[Sequence[str]],
    own_rows: Sequence[Sequence[str]],
    way_rows: Sequence[Sequence[str]],
    http: Sequence[Sequence[str]],
    transcript: str,
    told: Mapping[str, str],
    held: Sequence[Sequence[str]],
    directory: Path,
    seconds: float,
) -> str:
    """The whole page."""
    read = {
        name: json.loads((directory / f"{name}.json").read_text())["float32"]
        for name in ("demo/pruned", "demo/novices", "olmoe/pruned")
    }
    lengths = [len(one["prompt"]) for found in read.values() for one in found]
    head = Path(__file__).with_name("serving.head.md").read_text(encoding="utf-8")
    return head.format(
        stock=table([STOCK, *rows]),
        own=table([OWN, *own_rows]),
        ways=table([WAY, *way_rows]),
        http=table([["checkpoint", "computed in", "whole continuations"], *http]),
        transcript=transcript,
        held=table([HELD, *held]),
        told="".join(f"- {name}: {what}\n" for name, what in told.items()),
        vllm=VERSIONS.get("vllm"),
        vllm_transformers=VERSIONS.get("transformers"),
        transformers=transformers.__version__,
        torch=torch.__version__,
        prompts=len(read["demo/pruned"]),
        many=len(read["demo/novices"]),
        shortest=min(lengths),
        longest=max(lengths),
        tokens=len(read["demo/pruned"][0]["tokens"]),
        candidates=len(read["demo/pruned"][0]["top"][0]),
        least_bf16=LEAST["bfloat16"],
        least_f32=LEAST["float32"],
        tie=FLOAT32_TIE,
        cores=os.cpu_count(),
        machine=platform.machine(),
        seconds=seconds,
    )
