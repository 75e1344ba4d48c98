"""What a served checkpoint generates, against what transformers generates from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEAST = {"bfloat16": 0.9, "float32": 0.99}
"""Share of decisions behind equal prefixes that must agree."""

FLOAT32_TIE = 0.01
"""In float32 a step is undecided if two tokens are closer than this (nats), and log-probabilities
differ by less: what scales all logits, or another activation, need not change the largest."""


@dataclass
class Compared:
    """One checkpoint in one precision, vLLM against transformers."""

    decisions: int = 0
    same: int = 0
    whole: int = 0
    continuations: int = 0
    gaps: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    unpruned: list[bool] = field(default_factory=list)

    @property
    def agreement(self) -> float:
        return self.same / self.decisions

    def add(self, expected: Mapping[str, Any], served: Mapping[str, Any]) -> None:
        """One prompt."""
        self.continuations += 1
        self.whole += expected["tokens"] == served["tokens"]
        self.noise += expected["noise"]
        self.unpruned += [
            a == b for a, b in zip(expected["tokens"], expected["original"], strict=True)
        ]
        for step, (ours, theirs) in enumerate(
            zip(expected["tokens"], served["tokens"], strict=True)
        ):
            top, served_top = dict(expected["top"][step]), dict(served["top"][step])
            self.decisions += 1
            self.moved.append(abs(top[ours] - served_top.get(ours, float("-inf"))))
            if ours != theirs:
                self.gaps.append(top[ours] - top.get(theirs, float("-inf")))
                return
            self.same += 1

    def faults(self, dtype: str) -> list[str]:
        """Why this is not the same model, if it is not."""
        found = []
        if self.agreement < LEAST[dtype]:
            found.append(f"{self.agreement:.1%} of the decisions agree, not {LEAST[dtype]:.0%}")
        tie = FLOAT32_TIE if dtype == "float32" else 2 * max(self.noise)
        if self.gaps and max(self.gaps) > tie:
            found.append(f"differs where the reference was sure: by {max(self.gaps):.3f} nats")
        if dtype == "float32" and self.moved and max(self.moved) > FLOAT32_TIE:
            found.append(f"log-probabilities differ by up to {max(self.moved):.3f} nats")
        return found
