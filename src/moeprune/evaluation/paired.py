"""What a student lost against its teacher on the same windows: intervals, verdicts, findings.

Both read the same windows, so what is hard for both cancels: the difference of loss is taken window
by window. Windows of one document are not independent; documents are, where they are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeprune.evaluation.intervals import (
    FEWEST,
    LEVEL,
    Estimate,
    Interval,
    combined,
    counted,
    estimate,
    holm,
    verdict,
)
from moeprune.evaluation.perplexity import DomainScore

WANTED = 0.02
"""Nats per token: a difference of 2 % of perplexity is worth knowing."""
ROUNDING = 1e-5
"""Nats per token: the same function computed in another order differs by less."""
UNIT = "nats per token"


@dataclass(frozen=True)
class Paired:
    """The differences of one domain, or of several together.

    Attributes:
        tokens: predicted tokens.
        windows: that they stand in.
        loss: mean of loss(student) - loss(teacher), nats per token.
        kl: mean of KL(teacher || student), nats per token.
        agreement: share of tokens at which both put the same token first.
        same: whether both gave the same numbers for every window.
        domains: how many are together.
    """

    tokens: int
    windows: int
    loss: Estimate
    kl: Estimate
    agreement: Estimate
    same: bool
    domains: int = 1

    @classmethod
    def of(cls, name: str, student: DomainScore, teacher: DomainScore) -> Paired:
        """One domain."""
        one, two = student.sums, teacher.sums
        known = student.document_N is not None
        unit = "documents" if known else "windows of one document"

        def mean(sums_N: Any) -> Estimate:
            return estimate(sums_N, one.tokens_N, student.document_N, unit, stream=name)

        return cls(
            student.tokens,
            len(one.tokens_N),
            mean(one.nll_N - two.nll_N),
            mean(one.kl_N),
            mean(one.agree_N),
            bool(np.array_equal(one.nll_N, two.nll_N) and not one.kl_N.any()),
        )

    @classmethod
    def pooled(cls, parts: Sequence[Paired]) -> Paired:
        """Several domains, every token counting the same; domains are strata, not a sample."""
        tokens = sum(part.tokens for part in parts)

        def mean(what: str) -> Estimate:
            return combined([(part.tokens / tokens, getattr(part, what)) for part in parts])

        return cls(
            tokens,
            sum(part.windows for part in parts),
            mean("loss"),
            mean("kl"),
            mean("agreement"),
            all(part.same for part in parts),
            len(parts),
        )

    def to_json(self, wanted: float, sequences: int) -> dict[str, Any]:
        """``against`` of the evaluation; ``sequences`` is how many windows were asked for."""
        kl = self.kl.interval()
        agreement = self.agreement.interval()
        loss = self.loss.interval()
        if self.same:
            loss, kl, agreement = (self._without_spread(each) for each in (loss, kl, agreement))
        elif agreement.value == 1.0:  # the same choices; not the same numbers
            agreement = self._without_spread(agreement)
        kl = kl.within(0.0, math.inf)
        agreement = agreement.within(0.0, 1.0)
        smallest = self.loss.smallest()
        return {
            "loss": loss.to_json(),
            "kl": kl.to_json(),
            "agreement": agreement.to_json(),
            "smallest": smallest if math.isfinite(smallest) else None,
            "verdict": self._verdict(loss, wanted, sequences),
        }

    def _without_spread(self, interval: Interval) -> Interval:
        """Identical on all G items: at most 1 - (1 - level)^(1/G) of all items are not."""
        method = f"no spread: the same on every one of the {self.loss.unit}"
        low = interval.value
        if interval.value == 1.0:  # agreement; a differing item could agree nowhere
            low = (1.0 - interval.level) ** (1.0 / interval.items)
        return replace(interval, low=low, high=interval.value, method=method)

    def _verdict(self, loss: Interval, wanted: float, sequences: int) -> str:
        """In words; of the loss, which is what both models were trained on."""
        items = loss.items
        if self.same:
            most = 1.0 - (1.0 - loss.level) ** (1.0 / items)
            return (
                f"no difference: the same on all {counted(items, self.loss.unit)} "
                f"(at {loss.level:.0%}, fewer than {most:.0%} of such {self.loss.unit} differ)"
            )
        if items >= FEWEST and max(abs(loss.low), abs(loss.high)) <= ROUNDING:
            return f"no difference: less than {ROUNDING:g} {UNIT}, which is rounding"
        smallest = self.loss.smallest()
        return verdict(
            loss,
            smallest,
            wanted,
            UNIT,
            things=self.loss.unit,
            advice=self._advice(smallest, wanted, sequences),
        )

    def _advice(self, smallest: float, wanted: float, sequences: int) -> str:
        """How many windows per domain would show a difference of ``wanted``.

        The standard error falls with the root of the number of documents.
        """
        factor = FEWEST / self.loss.items
        if math.isfinite(smallest):
            factor = max(factor, (smallest / wanted) ** 2)
        here = self.windows / self.domains
        needed = math.ceil(max(1.0, factor) * here)
        if sequences and here >= sequences:
            return f"use --sequences {needed}"
        return f"give more text (about {needed} windows per domain; this has {here:.0f})"


def lost_more(domains: Mapping[str, Paired], wanted: float, others: str) -> list[str]:
    """Sentences on those that lost more than the rest together, worst first.

    The difference to the rest has an interval of its own; p-values are corrected for looking at
    all of them (Holm), and differences smaller than ``wanted`` are left out. Nothing is said of
    fewer than ``FEWEST`` documents, nor against so few.

    Args:
        domains: what is compared, disjoint.
        wanted: the difference that matters, nats per token.
        others: what the rest is called.
    """
    if len(domains) < 2:
        return []
    gaps = []
    for name, one in domains.items():
        rest = Paired.pooled([other for key, other in domains.items() if key != name])
        if min(one.loss.items, rest.loss.items) >= FEWEST:
            gaps.append((name, one.loss.minus(rest.loss)))
    # of two, either is the rest of the other: that is one look
    looks = len(gaps) if len(domains) > 2 else 1
    p_values = [gap.p_value() for _, gap in gaps]
    p_D = holm(p_values) if looks > 1 else p_values
    shown = [
        (gap.value, name, gap.interval(), float(p))
        for (name, gap), p in zip(gaps, p_D, strict=True)
        if p < 1.0 - LEVEL and gap.value > wanted
    ]
    corrected = f", corrected for {looks} looks" if looks > 1 else ""
    return [
        f"{name} lost {value:.3g} {UNIT} more than {others} "
        f"({interval.low:.3g} to {interval.high:.3g}; p {_p(p)}{corrected})"
        for value, name, interval, p in sorted(shown, key=lambda each: (-each[0], each[1]))
    ]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
