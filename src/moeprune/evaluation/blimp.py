"""The BLiMP sample of the package: is the well-formed sentence of a pair the likelier one?

Measured as lm-evaluation-harness measures BLiMP (task version 1.0): both sentences without context,
after the tokenizer's beginning-of-sequence token; right where the first has the higher sum of
log-probabilities. It needs nothing that is not installed with the package.

Source: Warstadt et al. 2020, arXiv 1912.00582.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from importlib.resources import files as resource_files
from pathlib import Path
from typing import Any

from moeprune.errors import DataError
from moeprune.evaluation.likelihood import BATCH_SIZE, Pair, likelihoods
from moeprune.models.loading import LayeredModel

NAME = "blimp_sample"
CHANCE = 0.5


def sample_path() -> Path:
    """The file in the package."""
    return Path(str(resource_files("moeprune.assets"))) / "blimp" / "sample.jsonl.gz"


def read_sample(limit: int | None = None) -> list[dict[str, str]]:
    """Pairs with ``sentence_good``, ``sentence_bad``, ``linguistics_term``, ``UID``.

    Args:
        limit: takes the first of every paradigm in turn, so that fewer are as balanced as can be.
    """
    with gzip.open(sample_path(), "rt", encoding="utf-8") as lines:
        rows: list[dict[str, str]] = [json.loads(line) for line in lines]
    turns: dict[str, int] = {}
    order = []
    for row in rows:
        turns[row["UID"]] = turns.get(row["UID"], -1) + 1
        order.append(turns[row["UID"]])
    ranked = sorted(range(len(rows)), key=lambda i: order[i])  # stable: paradigms keep their order
    return [rows[i] for i in ranked[:limit]]


def blimp(
    models: Mapping[str, LayeredModel],
    tokenizer: Any,
    max_length: int,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[bool]]:
    """Which pairs each model gets right, in the order of ``read_sample``.

    Args:
        models: by name; all read the same tokens.
        tokenizer: of these models.
        max_length: tokens that a model reads at most.
        limit, batch_size, workers, progress: as in ``read_sample`` and ``likelihoods``.

    Raises:
        DataError: the tokenizer has no token to begin with.
    """
    pairs = [
        _pair(tokenizer, row[column])
        for row in read_sample(limit)
        for column in ("sentence_good", "sentence_bad")
    ]
    answers = likelihoods(models, [pairs], max_length, batch_size, workers, progress)
    return {
        name: [
            good.loglikelihood >= bad.loglikelihood  # a tie goes to the first, as argmax does it
            for good, bad in zip(found[::2], found[1::2], strict=True)
        ]
        for name, found in answers.items()
    }


def _pair(tokenizer: Any, sentence: str) -> Pair:
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    if start is None:
        raise DataError("the tokenizer has neither a beginning nor an end-of-sequence token")
    ids = tuple(tokenizer.encode(" " + sentence, add_special_tokens=False))
    if ids[0] == start:
        return Pair(ids[:1], ids[1:])
    return Pair((start,), ids)
