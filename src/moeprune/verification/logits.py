"""Logits of a compressed model against those of the original, restricted in memory to the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moeprune.core.layer_plan import LayerPlan
from moeprune.errors import DataError, MoepruneError
from moeprune.models.bounds import Limits, Load, share
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import demo_text, load_tokenizer, token_keys, tokenise
from moeprune.models.depth import pass_through
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.restrict import AlignedModel, PlannedModel, RestrictedModel, Restriction
from moeprune.models.walk import Batch, Walk, default_workers

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of a logit, as a fraction of the largest logit, by the type computed in.

Deletion leaves the arithmetic as it is and is equal to the bit. Constants are added by another
formula, and other kernels may be chosen for other numbers of experts: both are rounding.
"""

_SEQUENCES, _LENGTH = 4, 48


def compare_logits(
    result: Checkpoint,
    original: Checkpoint,
    restrictions: Mapping[int, Restriction],
    dtype: str = "float32",
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    skipped: Sequence[int] = (),
    planned: Mapping[int, LayerPlan] | None = None,
    limits: Limits = Limits(),
) -> dict[str, Any]:
    """Walk both models over a few short sequences, layer by layer.

    Args:
        result: the compressed checkpoint.
        original: what it was made from.
        restrictions: what the original's layers are restricted to.
        dtype: to compute in, one of ``TOLERANCE``.
        device: to compute on.
        progress: told (steps done, steps in all).
        skipped: layers of the original that are left out.
        planned: edits of the original's layers that are made instead of restricting them.
        limits: what the walks are held to.

    Raises:
        MoepruneError: a model cannot be run, or the two have different vocabularies.
    """
    computed = getattr(torch, dtype)
    zeros = AlignedModel(result, computed, device)
    first: LayeredModel = RestrictedModel(original, restrictions, zeros, computed, device)
    if planned is not None:
        first = PlannedModel(original, planned, computed, device)
    second = AlignedModel(result, computed, device)
    first.limits = second.limits = limits
    sizes = [text_config(model.config).vocab_size for model in (first, second)]
    if sizes[0] != sizes[1]:
        raise MoepruneError(f"the vocabularies have {sizes[0]} and {sizes[1]} tokens")
    ids_BL, kind = _token_ids(original, sizes[0])
    batch = Batch(ids_BL, token_keys(ids_BL))
    steps = len(first.layers)
    for index in skipped:
        pass_through(first.layers[index])
    share([first, second], Load([batch.size], default_workers(first.device)))
    outputs = []
    for number, model in enumerate((first, second)):

        def tell(done: int, _: int, offset: int = number * steps) -> None:
            progress(offset + done, steps + len(second.layers))

        with Walk(model, [batch], progress=tell) as walk:
            walk.layers()
            outputs.append(walk.logits_of(0).float())
    return _compare(outputs[0], outputs[1], dtype) | {"tokens": ids_BL.numel(), "text": kind}


def _compare(reference_BLV: Tensor, logits_BLV: Tensor, dtype: str) -> dict[str, Any]:
    largest = float(reference_BLV.abs().max())
    tolerance = TOLERANCE[dtype] * largest
    difference = float((reference_BLV - logits_BLV).abs().max())
    finite = math.isfinite(difference) and math.isfinite(largest)
    agree = (reference_BLV.argmax(-1) == logits_BLV.argmax(-1)).float().mean()
    return {
        "equal": bool(torch.equal(reference_BLV, logits_BLV)),
        "difference": difference if finite else None,
        "tolerance": tolerance if finite else None,
        "agreement": float(agree),
        "dtype": dtype,
        "passed": finite and difference <= tolerance,
    }


def _token_ids(checkpoint: Checkpoint, vocabulary: int) -> tuple[Tensor, str]:
    """Sequences of the embedded text, or of seeded random tokens where there is no tokenizer."""
    try:
        file = demo_text("heldout")["english"]
        ids_BL = tokenise(load_tokenizer(checkpoint), "english", file, _LENGTH, _SEQUENCES).ids_NL
        if int(ids_BL.max()) < vocabulary:
            return ids_BL, "embedded text"
    except DataError:
        pass
    generator = torch.Generator().manual_seed(0)
    shape = (_SEQUENCES, _LENGTH)
    return torch.randint(0, vocabulary, shape, generator=generator), "random tokens"
