"""Held-out perplexity per domain and, against a teacher, KL divergence and top-1 agreement.

All models walk the same batches layer by layer; then, batch by batch, their logits are compared and
forgotten, so that neither models nor logits need fit in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeprune.errors import DataError
from moeprune.models.data import Domain, token_keys
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.walk import Batch, Walk, default_workers

_LOGITS_PER_BATCH = 1 << 25  # values, of one model
_TOKENS_PER_BATCH = 4096
_POSITIONS = 64  # whose logits are compared at once


@dataclass
class DomainScore:
    """Sums over the predicted tokens of one domain.

    Attributes:
        tokens: predicted tokens.
        nll: sum of -log p(token), nats.
        kl: sum of KL(teacher || student), nats; None without a teacher.
        agree: tokens at which both put the same token first; None without a teacher.
        bytes_per_token: of the text.
    """

    tokens: int = 0
    nll: float = 0.0
    kl: float | None = None
    agree: int | None = None
    bytes_per_token: float = 1.0

    def add(self, other: DomainScore) -> None:
        """Add other tokens of the same domain."""
        self.tokens += other.tokens
        self.nll += other.nll
        if other.kl is not None and other.agree is not None:
            self.kl = (self.kl or 0.0) + other.kl
            self.agree = (self.agree or 0) + other.agree

    def to_json(self) -> dict[str, float | int | None]:
        """Means per token; None where logits were not finite, which JSON cannot say."""
        loss = self.nll / self.tokens
        known = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700.0 else loss * math.inf,
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "kl": math.nan if self.kl is None else self.kl / self.tokens,
            "agreement": math.nan if self.agree is None else self.agree / self.tokens,
        }
        finite = {key: value if math.isfinite(value) else None for key, value in known.items()}
        return {"tokens": self.tokens, **finite}


@dataclass
class Evaluation:
    """What was measured on one model.

    Attributes:
        domains: sums by domain.
        seconds: of its walk through the layers.
    """

    domains: dict[str, DomainScore] = field(default_factory=dict)
    seconds: float = 0.0

    def total(self) -> DomainScore:
        """Over all domains, every token counting the same."""
        total = DomainScore()
        for score in self.domains.values():
            total.add(score)
        return total


def evaluate(
    models: Mapping[str, LayeredModel],
    domains: Sequence[Domain],
    teacher: str | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Evaluation]:
    """Measure all ``models`` on the same sequences.

    Each sequence is a window of its own; every token but its first is predicted.

    Args:
        models: by name.
        domains: what to read.
        teacher: the name of the one that the others are compared with, if any.
        workers: as in ``Walk``.
        progress: told (steps done, steps in all).

    Raises:
        DataError: vocabularies of teacher and student differ.
    """
    parts = [
        (domain, Batch(ids_BL, token_keys(ids_BL)))
        for domain in domains
        for ids_BL in domain.ids_NL.split(_rows(models, domain))
    ]
    batches = [batch for _, batch in parts]
    steps = [len(model.layers) * len(batches) for model in models.values()]
    total, before = sum(steps) + len(batches), 0
    results = {name: Evaluation() for name in models}
    with ExitStack() as stack:
        walks: dict[str, Walk] = {}
        for (name, model), own in zip(models.items(), steps, strict=True):
            start = time.perf_counter()

            def tell(done: int, _: int, offset: int = before) -> None:
                progress(offset + done, total)

            walks[name] = stack.enter_context(Walk(model, batches, workers, tell))
            walks[name].layers()
            results[name].seconds = time.perf_counter() - start
            before += own

        def score(index: int) -> dict[str, DomainScore]:
            if batches[index].ids_BL.device.type == "cpu":
                torch.set_num_threads(1)
            return _score(index, batches[index].ids_BL, walks, teacher)

        device = next(iter(models.values())).device
        with ThreadPoolExecutor(workers or default_workers(device)) as pool:
            for index, scores in enumerate(pool.map(score, range(len(batches)))):
                domain = parts[index][0]
                for name, value in scores.items():
                    own_score = results[name].domains.setdefault(
                        domain.name, DomainScore(bytes_per_token=domain.bytes_per_token)
                    )
                    own_score.add(value)
                progress(before + index + 1, total)
    return results


def _rows(models: Mapping[str, LayeredModel], domain: Domain) -> int:
    vocabularies: set[int] = {text_config(model.config).vocab_size for model in models.values()}
    if len(vocabularies) > 1:
        raise DataError(f"teacher and student have different vocabularies: {sorted(vocabularies)}")
    tokens = min(_TOKENS_PER_BATCH, _LOGITS_PER_BATCH // vocabularies.pop())
    return max(1, tokens // domain.ids_NL.shape[1])


def _score(
    index: int, ids_BL: Tensor, walks: Mapping[str, Walk], teacher: str | None
) -> dict[str, DomainScore]:
    """All models on one batch."""
    reference: _Reference | None = None
    scores = {}
    names = sorted(walks, key=lambda name: name != teacher)  # the teacher first
    for name in names:
        logits_BLV = walks[name].logits_of(index)[:, :-1]
        if name == teacher:
            reference = _Reference.of(logits_BLV)
        score = DomainScore(ids_BL[:, 1:].numel())
        for at, logp_nV in _log_softmax(logits_BLV):
            target_n1 = ids_BL[at[0], 1:][at[1], None].to(logp_nV.device)
            score.nll -= float(logp_nV.gather(-1, target_n1).double().sum())
            if reference is not None and name != teacher:
                reference.compare(at, logp_nV, score)
        scores[name] = score
    return scores


_At = tuple[int, slice]
"""A sequence of a batch, and some of its positions."""


def _log_softmax(logits_BLV: Tensor) -> Iterator[tuple[_At, Tensor]]:
    """Log-probabilities a few positions at a time: what stays in the cache is ten times faster."""
    for row, logits_LV in enumerate(logits_BLV):
        for start in range(0, len(logits_LV), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            yield (row, part), torch.log_softmax(logits_LV[part].float(), dim=-1)


@dataclass
class _Reference:
    """What the teacher says of one batch."""

    logp_BLV: Tensor
    p_BLV: Tensor
    best_BL: Tensor

    @classmethod
    def of(cls, logits_BLV: Tensor) -> _Reference:
        """Its log-probabilities, probabilities and first choices."""
        logp_BLV = torch.empty_like(logits_BLV, dtype=torch.float32)
        for at, logp_nV in _log_softmax(logits_BLV):
            logp_BLV[at] = logp_nV
        return cls(logp_BLV, logp_BLV.exp(), logp_BLV.argmax(-1))

    def compare(self, at: _At, logp_nV: Tensor, score: DomainScore) -> None:
        """Add KL(teacher || student) and agreement at some positions."""
        gap_nV = self.logp_BLV[at] - logp_nV
        kl_n = torch.linalg.vecdot(self.p_BLV[at], gap_nV)
        score.kl = (score.kl or 0.0) + float(kl_n.double().sum())
        score.agree = (score.agree or 0) + int((self.best_BL[at] == logp_nV.argmax(-1)).sum())
