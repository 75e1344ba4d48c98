"""A made-up run with plausible numbers, in the shape of ``moeprune demo --json``."""

from __future__ import annotations

import random
from typing import Any

DOMAINS = {"english": 31.2, "german": 44.7, "code": 12.9, "chemistry": 27.4}
BYTES = 25_445_760
PARAMETERS = 12_722_880


def fake_run(layers: int = 6, experts: int = 32, seed: int = 0) -> dict[str, Any]:
    """Seven results of three methods on a small model."""
    rng = random.Random(seed)
    usage = {str(i): _shares(rng, experts) for i in range(layers)}
    rows = [_row("unpruned", None, 0.0, 1.0, layers, experts)]
    for ratio, loss in ((0.25, 1.05), (0.5, 1.31)):
        for method, harm in (("mone", 0.7), ("moeits", 1.0)):
            row = _row(f"{method}-{ratio:.0%}"[:-1], method, ratio, loss**harm, layers, experts)
            row["plan"] = _plan(rng, usage, ratio, experts, method)
            rows.append(row)
    for ratio, loss in ((0.3, 1.02), (0.5, 1.09), (0.7, 2.4)):
        row = _row(f"moe-pruner-{ratio:.0%}"[:-1], "moe-pruner", 0.0, loss, layers, experts)
        row["budget"] = {"ratio": ratio}
        row["nonzero_parameters"] = round(PARAMETERS * (1 - 0.9 * ratio))
        row["plan"] = {
            str(i): {"keep": list(range(experts)), "replaced": [], "dropped": [], "scores": {}}
            for i in range(layers)
        }
        rows.append(row)
    rows[4]["warnings"] = ["layer 3: 4 of the kept experts saw fewer than 100 calibration tokens"]
    return {
        "format": "moeprune.run/1",
        "command": "moeprune demo --out demo-out",
        "model": {
            "name": "demo",
            "model_type": "olmoe",
            "layers": layers,
            "moe_layers": list(range(layers)),
            "experts": experts,
            "top_k": 4,
            "parameters": PARAMETERS,
            "bytes": BYTES,
            "fingerprint": "ab12" * 16,
        },
        "calibration": {
            "tokens": 61_440,
            "sequences": 120,
            "domains": dict.fromkeys(DOMAINS, 30),
            "seconds": 4.2,
            "data_hash": "9f3c" * 16,
        },
        "usage": usage,
        "atlas": _atlas(rng, usage, rows),
        "rows": rows,
        "warnings": ["This model is a toy: do not draw conclusions about large models from it."],
        "versions": {"moeprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.1"},
        "seconds": 95.1,
    }


def _row(
    name: str, method: str | None, ratio: float, loss: float, layers: int, experts: int
) -> dict[str, Any]:
    kept = round(layers * experts * (1 - ratio))
    worse = dict(zip(DOMAINS, (0.9, 1.0, 1.6, 1.1), strict=True))
    return {
        "name": name,
        "method": method,
        "budget": {"ratio": ratio} if method else None,
        "options": {"score": "fusion", "novice": "mean", "beta": 0.5} if method else None,
        "experts": kept,
        "experts_before": layers * experts,
        "parameters": round(PARAMETERS * (1 - 0.9 * ratio)),
        "nonzero_parameters": round(PARAMETERS * (1 - 0.9 * ratio)),
        "bytes": round(BYTES * (1 - 0.9 * ratio)) + (2048 if method == "mone" else 0),
        "perplexity": {d: value * loss ** worse[d] for d, value in DOMAINS.items()},
        "kl": None if method is None else 0.6 * (loss - 1),
        "agreement": None if method is None else 0.97 - 0.3 * (loss - 1),
        "seconds": {"plan": 0.1, "apply": 0.2, "evaluate": 3.0} if method else {"evaluate": 3.1},
        "peak_memory_bytes": 4.1e8,
        "path": f"demo-out/{name}" if method else None,
        "warnings": [],
    }


def _atlas(
    rng: random.Random, usage: dict[str, list[float]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What experts served: domains at random, the same tokens for all."""
    layers: dict[str, Any] = {}
    for layer, shares in usage.items():
        count = [round(40_000 * share) for share in shares]
        parts = [[rng.expovariate(1) ** 2 for _ in DOMAINS] for _ in shares]
        layers[layer] = {
            "count": count,
            "gate": [round(rng.uniform(0.1, 0.5), 3) for _ in shares],
            "domains": [
                [round(n * part / sum(own)) for part in own]
                for n, own in zip(count, parts, strict=True)
            ],
            "tokens": [[[0, 40, 5.5], [1, 31, 2.25], [2, 7, 1.5]] for _ in shares],
        }
    measured = {
        row["name"]: {layer: [20.5, 32] for layer in usage} for row in rows if row["bytes"] > 0
    }
    return {
        "domains": list(DOMAINS),
        "tokens": [" und", "\n", "</script>"],
        "layers": layers,
        "routing": {"tokens": 6144, "rows": measured},
    }


def _shares(rng: random.Random, experts: int) -> list[float]:
    raw = [rng.lognormvariate(0, 0.8) for _ in range(experts)]
    raw[experts // 3] = 0.0
    return [value / sum(raw) for value in raw]


def _plan(
    rng: random.Random, usage: dict[str, list[float]], ratio: float, experts: int, method: str
) -> dict[str, Any]:
    plan = {}
    for layer, shares in usage.items():
        scores = [share * rng.lognormvariate(0, 0.5) for share in shares]
        order = sorted(range(experts), key=lambda e: scores[e])
        removed = sorted(order[: round(experts * ratio)])
        plan[layer] = {
            "keep": sorted(set(range(experts)) - set(removed)),
            "replaced": removed if method == "mone" else [],
            "dropped": [] if method == "mone" else removed,
            "scores": {"fusion": scores},
            "notes": ["two experts tie; the lower id was kept"] if layer == "2" else [],
        }
    return plan
