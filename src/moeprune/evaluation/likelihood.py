"""Log-likelihoods of continuations by the streamed walk, for models larger than memory.

Requests are put into batches exactly as lm-evaluation-harness 0.4.13 does for a model that is in
memory as a whole, so that the same batch size gives the same bits: longest first, padded at the end
with zeros and without a mask, and one row for all requests that differ in their last token only.

Axes: B rows of a batch, L positions, V vocabulary, C tokens of a continuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from moeprune.models.bounds import Load, share
from moeprune.models.data import token_keys
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.walk import Batch, Walk, default_workers

BATCH_SIZE = 16
_LOGITS_PER_BATCH = 1 << 27  # values; larger batches are split
_BATCHES_PER_WALK = 512  # each is a parked thread
_HIDDEN_PER_WALK = 1 << 28  # bytes of the residual stream; more text is walked in several passes


@dataclass(frozen=True)
class Pair:
    """A context, at least one token, and what is to follow it, at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def key(self) -> tuple[int, ...]:
        """What the model reads; requests with the same key share a row."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True)
class Answer:
    """log p(continuation | context) in nats, and whether greedy decoding would give it."""

    loglikelihood: float
    greedy: bool


@dataclass
class _Row:
    """One sequence of a batch, and the requests that it answers."""

    longest: Pair
    asked: list[tuple[int, Pair]]

    def read(self, max_length: int) -> tuple[int, ...]:
        whole = self.longest.context + self.longest.continuation
        return whole[-(max_length + 1) :][:-1]


def likelihoods(
    models: Mapping[str, LayeredModel],
    groups: Sequence[Sequence[Pair]],
    max_length: int,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Answer]]:
    """All models on the same requests, a layer of one model in memory at a time.

    Text that does not fit goes through in several passes, each of which reads every model once.

    Args:
        models: by name; all take the same tokens.
        groups: requests that may share a batch.
        max_length: tokens that a model reads at most; longer contexts lose their beginning.
        batch_size: rows per batch; fewer where the logits would be too many.
        workers: as in ``Walk``.
        progress: told (steps done, steps in all).

    Returns:
        Answers by model, in the order of the requests.
    """
    config = text_config(next(iter(models.values())).config)
    width = config.hidden_size * next(iter(models.values())).dtype.itemsize
    batches = list(_batches(groups, max_length, batch_size, config.vocab_size))
    passes = list(_passes(batches, max_length, _HIDDEN_PER_WALK // width))
    found: dict[str, dict[int, Answer]] = {name: {} for name in models}
    total = sum(len(model.layers) for model in models.values()) * len(batches)
    before = 0
    at_once = workers or default_workers(next(iter(models.values())).device)
    sizes = [[_size(batch, max_length) for batch in rows] for rows in passes]
    most, largest = (max(sizes, key=key, default=[]) for key in (len, _most_tokens))
    for asked in (most, largest):
        share(list(models.values()), Load(asked, at_once, chunks=True))
    for rows in passes:
        inputs = [_batch(batch, max_length) for batch in rows]
        for name, model in models.items():

            def tell(done: int, _: int, offset: int = before) -> None:
                progress(offset + done, total)

            with Walk(model, inputs, workers, tell, chunks=True) as walk:
                walk.layers()
                collect = _Collect(rows, max_length, found[name])
                walk.logits(collect)
            before += len(model.layers) * len(rows)
    return {name: [answers[i] for i in range(len(answers))] for name, answers in found.items()}


def _batches(
    groups: Sequence[Sequence[Pair]], max_length: int, size: int, vocabulary: int
) -> Iterator[list[_Row]]:
    number = 0
    for pairs in groups:
        rows: dict[tuple[int, ...], _Row] = {}
        for pair in pairs:
            row = rows.setdefault(pair.key, _Row(pair, []))
            row.asked.append((number, pair))
            if len(pair.continuation) > len(row.longest.continuation):
                row.longest = pair
            number += 1
        order = sorted(rows.values(), key=_longest_first)
        while order:
            length = len(order[0].read(max_length))
            count = max(1, min(size, _LOGITS_PER_BATCH // (length * vocabulary)))
            yield order[:count]
            del order[:count]


def _longest_first(row: _Row) -> tuple[int, tuple[int, ...]]:
    whole = row.longest.context + row.longest.continuation
    return -len(whole), whole


def _passes(
    batches: Sequence[list[_Row]], max_length: int, tokens: int
) -> Iterator[list[list[_Row]]]:
    """Batches whose residual streams fit together."""
    taken: list[list[_Row]] = []
    held = 0
    for batch in batches:
        size = math.prod(_size(batch, max_length))
        if taken and (held + size > tokens or len(taken) == _BATCHES_PER_WALK):
            yield taken
            taken, held = [], 0
        taken.append(batch)
        held += size
    if taken:
        yield taken


def _size(batch: Sequence[_Row], max_length: int) -> tuple[int, int]:
    """Rows and tokens of each; the first is the longest."""
    return len(batch), len(batch[0].read(max_length))


def _most_tokens(sizes: Sequence[tuple[int, int]]) -> int:
    return max(map(math.prod, sizes))


def _batch(rows: Sequence[_Row], max_length: int) -> Batch:
    read = [row.read(max_length) for row in rows]
    longest = max(len(ids) for ids in read)
    ids_BL = torch.zeros(len(read), longest, dtype=torch.int64)
    for row, ids in enumerate(read):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
    return Batch(ids_BL, token_keys(ids_BL))


@dataclass
class _Collect:
    """Takes logits apart into answers."""

    batches: Sequence[Sequence[_Row]]
    max_length: int
    answers: dict[int, Answer]

    def __call__(self, index: int, logits_BLV: Tensor) -> None:
        for row, logits_LV in zip(self.batches[index], logits_BLV, strict=True):
            end = len(row.read(self.max_length))
            part_CV = logits_LV[end - len(row.longest.continuation) : end]
            logp_CV = log_softmax(part_CV, dim=-1)  # in the model's dtype, as the harness does
            best_C = logp_CV.argmax(-1)
            for number, pair in row.asked:
                count = len(pair.continuation)
                ids_C = torch.tensor(pair.continuation, device=logp_CV.device)
                own_C = logp_CV[-count:].gather(-1, ids_C[:, None])[:, 0]
                greedy = bool((best_C[-count:] == ids_C).all())
                self.answers[number] = Answer(float(own_C.sum()), greedy)
