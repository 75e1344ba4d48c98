"""Held-out perplexity and, against a teacher, KL divergence and agreement, window by window.

All models walk the same batches layer by layer; then, batch by batch, their logits are compared and
forgotten, so that neither models nor logits need fit in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeprune.errors import DataError
from moeprune.models.bounds import Load, share
from moeprune.models.data import Domain, token_keys
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.ranks import ALONE, Ranks
from moeprune.models.walk import Batch, Walk, default_workers

if TYPE_CHECKING:
    from moeprune.evaluation.kept import KeptEvaluation

_LOGITS_PER_BATCH = 1 << 25  # values, of one model
_TOKENS_PER_BATCH = 4096
_REFERENCE = 8  # bytes that ``Reference`` holds of a logit
TOP = 5
_POSITIONS = 64  # whose logits are compared at once


Floats = NDArray[np.float64]


@dataclass
class Sums:
    """Sums over the predicted tokens of each window.

    Attributes:
        tokens_N: predicted tokens.
        nll_N: sum of -log p(token), nats.
        kl_N: sum of KL(teacher || student), nats; this and what follows are 0 without a teacher.
        agree_N: tokens at which both put the same token first.
        top5_N: tokens at which what the teacher puts first is among the student's first five.
    """

    tokens_N: Floats
    nll_N: Floats
    kl_N: Floats
    agree_N: Floats
    top5_N: Floats

    @classmethod
    def zeros(cls, windows: int) -> Sums:
        """Of so many windows, to be added to."""
        return cls(*(np.zeros(windows) for _ in range(5)))

    @classmethod
    def joined(cls, parts: Sequence[Sums]) -> Sums:
        """One after another."""
        rows = ((p.tokens_N, p.nll_N, p.kl_N, p.agree_N, p.top5_N) for p in parts)
        columns = zip(*rows, strict=True)
        return cls(*(np.concatenate(column) for column in columns))


@dataclass
class DomainScore:
    """What was measured on one domain, window by window.

    Attributes:
        sums: by window.
        compared: whether there was a teacher.
        bytes_per_token: of the text.
        document_N: the document of each window; None if that is not known.
    """

    sums: Sums
    compared: bool = False
    bytes_per_token: float = 1.0
    document_N: NDArray[np.int64] | None = None

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.sums.tokens_N.sum())

    def to_json(self) -> dict[str, float | int | None]:
        """Means per token; None where logits were not finite, which JSON cannot say."""
        tokens, compared = self.tokens, 1.0 if self.compared else math.nan
        loss = float(self.sums.nll_N.sum()) / tokens
        known = {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700.0 else loss * math.inf,
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "kl": compared * float(self.sums.kl_N.sum()) / tokens,
            "agreement": compared * float(self.sums.agree_N.sum()) / tokens,
            "agreement_top5": compared * float(self.sums.top5_N.sum()) / tokens,
        }
        finite = {key: value if math.isfinite(value) else None for key, value in known.items()}
        return {"tokens": tokens, "windows": len(self.sums.tokens_N), **finite}


def pooled(scores: Iterable[DomainScore]) -> DomainScore:
    """Several domains as one, every token counting the same."""
    found = list(scores)
    sums = Sums.joined([score.sums for score in found])
    tokens = sum(score.tokens for score in found)
    bytes_per_token = sum(score.bytes_per_token * score.tokens for score in found) / tokens
    return DomainScore(sums, all(score.compared for score in found), bytes_per_token)


@dataclass
class Evaluation:
    """What was measured on one model.

    Attributes:
        domains: by name.
        seconds: of its walk through the layers.
    """

    domains: dict[str, DomainScore] = field(default_factory=dict)
    seconds: float = 0.0

    def total(self) -> DomainScore:
        """Over all domains, every token counting the same."""
        return pooled(self.domains.values())


def evaluate(
    models: Mapping[str, LayeredModel],
    domains: Sequence[Domain],
    teacher: str | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
    kept: KeptEvaluation | None = None,
) -> dict[str, Evaluation]:
    """Measure all ``models`` on the same sequences.

    Each sequence is a window of its own; every token but its first is predicted.

    Args:
        models: by name.
        domains: what to read.
        teacher: the name of the one that the others are compared with, if any.
        workers: as in ``Walk``.
        progress: told (steps done, steps in all).
        ranks: processes that share the windows; the result is the same in all.
        kept: what was done before an interruption, and where to keep what is done.

    Raises:
        DataError: vocabularies of teacher and student differ.
    """
    parts = [
        (domain, Batch(ids_BL, token_keys(ids_BL)))
        for domain in domains
        for ids_BL in domain.ids_NL.split(_rows(models, domain))
    ]
    parts = parts[ranks.run_of(len(parts))]
    batches = [batch for _, batch in parts]
    known = {} if kept is None else kept.scores()
    left = [index for index in range(len(batches)) if index not in known]
    steps = [len(model.layers) * len(batches) for model in models.values()]
    total, before = sum(steps) + len(batches), 0
    results = {name: Evaluation() for name in models}
    at_once = workers or default_workers(next(iter(models.values())).device)
    load = Load([batch.size for batch in batches], at_once, chunks=True)
    share(list(models.values()), load, 0 if teacher is None else _REFERENCE)
    with ExitStack() as stack:
        walks: dict[str, Walk] = {}
        for (name, model), own in zip(models.items(), steps, strict=True):
            walks[name], results[name].seconds = _walked(
                name, model, batches, workers,
                lambda done, offset=before: progress(offset + done, total),  # type: ignore[misc]
                kept, stack, bool(left),
            )  # fmt: skip
            before += own

        def score(index: int) -> dict[str, Sums]:
            if batches[index].ids_BL.device.type == "cpu":
                torch.set_num_threads(1)
            return _score(index, batches[index].ids_BL, walks, teacher)

        threads = min((walk.way.workers for walk in walks.values() if left), default=1)
        with ThreadPoolExecutor(threads) as pool:
            for index, scores in zip(left, pool.map(score, left), strict=True):
                known[index] = scores
                if kept is not None:
                    kept.add(index, scores)
                progress(before + len(known), total)
    sums: dict[tuple[str, str], list[Sums]] = {}
    for index, (domain, _) in enumerate(parts):
        for name, value in known[index].items():
            sums.setdefault((name, domain.name), []).append(value)
    everybody = ranks.gather(sums)
    for name, result in results.items():
        compared = teacher is not None and name != teacher
        for domain in domains:
            document_N = None if domain.document_N is None else domain.document_N.numpy()
            found = (some.get((name, domain.name), ()) for some in everybody)
            joined = Sums.joined([part for some in found for part in some])
            score_ = DomainScore(joined, compared, domain.bytes_per_token, document_N)
            result.domains[domain.name] = score_
    return results


def _walked(
    name: str,
    model: LayeredModel,
    batches: Sequence[Batch],
    workers: int,
    progress: Callable[[int], None],
    kept: KeptEvaluation | None,
    stack: ExitStack,
    wanted: bool,
) -> tuple[Walk, float]:
    """A walk that stands behind its last layer, or, if it is not wanted, has not begun; seconds."""
    states = kept.walk(name, model) if wanted and kept is not None else None
    start = time.perf_counter()
    walk = Walk(
        model, batches, workers, lambda done, _: progress(done),
        start=None if states is None else states.start, chunks=True,
    )  # fmt: skip
    earlier = 0.0 if states is None or kept is None else kept.seconds(states)

    def spent() -> float:
        return earlier + time.perf_counter() - start

    def done(index: int, outputs: Sequence[object]) -> None:
        if states is not None and kept is not None:
            kept.save(states, index, outputs, spent(), walk.rest)

    if wanted:
        stack.enter_context(walk)
        walk.layers(done=done)
    return walk, spent()


def refuse_other_vocabulary(models: Mapping[str, LayeredModel]) -> int:
    """The vocabulary that all models share.

    Raises:
        DataError: they do not.
    """
    found: set[int] = {text_config(model.config).vocab_size for model in models.values()}
    if len(found) > 1:
        raise DataError(
            f"teacher and student have different vocabularies: {sorted(found)}",
            "give --teacher the model that this one was made from",
        )
    return found.pop()


def _rows(models: Mapping[str, LayeredModel], domain: Domain) -> int:
    return window_rows(refuse_other_vocabulary(models), domain.ids_NL.shape[1])


def window_rows(vocabulary: int, length: int) -> int:
    """How many windows of ``length`` tokens go together, so that their logits fit in memory."""
    return max(1, min(_TOKENS_PER_BATCH, _LOGITS_PER_BATCH // vocabulary) // length)


def _score(
    index: int, ids_BL: Tensor, walks: Mapping[str, Walk], teacher: str | None
) -> dict[str, Sums]:
    """All models on one batch."""
    reference: Reference | None = None
    scores = {}
    names = sorted(walks, key=lambda name: name != teacher)  # the teacher first
    for name in names:
        logits_BLV = walks[name].logits_of(index)[:, :-1]
        if name == teacher:
            reference = Reference.of(logits_BLV)
        scores[name] = window_sums(logits_BLV, ids_BL, reference if name != teacher else None)
        del logits_BLV  # not beside those of the next model
    return scores


def window_sums(logits_BLV: Tensor, ids_BL: Tensor, reference: Reference | None) -> Sums:
    """What the logits of one batch say of its windows.

    Args:
        logits_BLV: of every position but the last.
        ids_BL: the tokens.
        reference: what the teacher says, if there is one.
    """
    sums = Sums.zeros(len(ids_BL))
    sums.tokens_N += ids_BL.shape[1] - 1
    for at, logp_nV in _log_softmax(logits_BLV):
        target_n1 = ids_BL[at[0], 1:][at[1], None].to(logp_nV.device)
        sums.nll_N[at[0]] -= float(logp_nV.gather(-1, target_n1).double().sum())
        if reference is not None:
            reference.compare(at, logp_nV, sums)
    return sums


_At = tuple[int, slice]
"""A sequence of a batch, and some of its positions."""


def _log_softmax(logits_BLV: Tensor) -> Iterator[tuple[_At, Tensor]]:
    """Log-probabilities a few positions at a time: what stays in the cache is ten times faster."""
    for row, logits_LV in enumerate(logits_BLV):
        for start in range(0, len(logits_LV), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            yield (row, part), torch.log_softmax(logits_LV[part].float(), dim=-1)


@dataclass
class Reference:
    """What the teacher says of one batch."""

    logp_BLV: Tensor
    p_BLV: Tensor
    best_BL: Tensor

    @classmethod
    def of(cls, logits_BLV: Tensor) -> Reference:
        """Its log-probabilities, probabilities and first choices."""
        logp_BLV = torch.empty_like(logits_BLV, dtype=torch.float32)
        for at, logp_nV in _log_softmax(logits_BLV):
            logp_BLV[at] = logp_nV
        return cls(logp_BLV, logp_BLV.exp(), logp_BLV.argmax(-1))

    def compare(self, at: _At, logp_nV: Tensor, sums: Sums) -> None:
        """Add KL(teacher || student) and agreement at some positions."""
        gap_nV = self.logp_BLV[at] - logp_nV
        kl_n = torch.linalg.vecdot(self.p_BLV[at], gap_nV)
        best_n1 = self.best_BL[at][:, None]
        above_n = (logp_nV > logp_nV.gather(-1, best_n1)).sum(-1)
        sums.kl_N[at[0]] += float(kl_n.double().sum())
        sums.agree_N[at[0]] += int((best_n1[:, 0] == logp_nV.argmax(-1)).sum())
        sums.top5_N[at[0]] += int((above_n < TOP).sum())
