"""Speed and working memory of models, measured in one run in which they take turns.

What else a machine does, and how warm it is, changes within seconds: only what was measured in
turns can be compared. Axes: B sequences, L prompt tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from moeprune.evaluation import intervals
from moeprune.models.native import quiet_transformers


@dataclass(frozen=True)
class Meter:
    """What is read around a measurement.

    Attributes:
        begin: called before it.
        end: called after it; gives the largest memory since ``begin`` beyond what was in use then,
            and the energy used since, in joules. None for what cannot be known.
    """

    begin: Callable[[], None]
    end: Callable[[], tuple[int | None, float | None]]


@dataclass(frozen=True)
class Sample:
    """One model, one prompt.

    Attributes:
        prefill: seconds from the call to the first token's logits.
        decode: seconds from there to the last token's logits.
        working: bytes, of activations and cache.
        joules: of the whole machine, during both.
    """

    prefill: float
    decode: float
    working: int | None
    joules: float | None


class _Clock(LogitsProcessor):  # type: ignore[misc]
    """Notes when the logits of each new token are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, unchanged."""
        if scores.device.type == "cuda":
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores


def take_turns(
    models: Mapping[str, Any],
    prompts: Sequence[Tensor],
    new_tokens: int,
    warm_up: int,
    meter: Meter,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Sample]]:
    """A B A B ...: every model on the first prompt, then on the second, and so on.

    Greedy, with the cache on, always ``new_tokens`` tokens: no token ends an answer.

    Args:
        models: by name; all of them are in memory.
        prompts: ids [B, L] of one turn each.
        new_tokens: of each turn, at least 2.
        warm_up: turns on the first prompt that do not count.
        meter: of memory and energy.
        progress: told (turns done, turns in all).
    """
    found: dict[str, list[Sample]] = {name: [] for name in models}
    turns = [prompts[0]] * warm_up + list(prompts)
    for number, ids_BL in enumerate(turns):
        for place, (name, model) in enumerate(models.items()):
            sample = _sample(model, ids_BL, new_tokens, meter)
            if number >= warm_up:
                found[name].append(sample)
            progress(number * len(models) + place + 1, len(turns) * len(models))
    return found


@torch.no_grad()
def _sample(model: Any, ids_BL: Tensor, new_tokens: int, meter: Meter) -> Sample:
    clock, before = _Clock(), model.generation_config
    ids_BL = ids_BL.to(model.device)
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )
    try:
        meter.begin()
        start = time.perf_counter()
        with quiet_transformers():
            model.generate(
                ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                logits_processor=LogitsProcessorList([clock]),
            )
        working, joules = meter.end()
    finally:
        model.generation_config = before
    return Sample(clock.times[0] - start, clock.times[-1] - clock.times[0], working, joules)


def rates(samples: Sequence[Sample], shape: Sequence[int], new_tokens: int) -> dict[str, Any]:
    """Medians of one model: tokens per second, working memory, joules per new token."""
    batch, length = shape
    memory = [sample.working for sample in samples if sample.working is not None]
    energy = [sample.joules for sample in samples if sample.joules is not None]
    return {
        "prefill_tokens_per_second": batch * length / median(s.prefill for s in samples),
        "decode_tokens_per_second": batch * (new_tokens - 1) / median(s.decode for s in samples),
        "working_bytes": int(median(memory)) if memory else None,
        "joules_per_token": median(energy) / (batch * new_tokens) if energy else None,
    }


def speedup(mine: Sequence[float], teachers: Sequence[float]) -> intervals.Interval:
    """How many times as fast as the teacher: the geometric mean of the ratios turn by turn.

    Args:
        mine, teachers: seconds of each turn.
    """
    logs = [math.log(b / a) for a, b in zip(mine, teachers, strict=True)]
    found = intervals.estimate(logs, unit="turns").interval()
    value, low, high = (math.exp(x) for x in (found.value, found.low, found.high))
    return intervals.Interval(
        value, low, high, found.level, found.items, f"{found.method}, of logarithms"
    )


def speed_verdict(ratio: intervals.Interval, what: str) -> str:
    """A ratio of speeds in words."""
    between = f"{ratio.low:.2f} to {ratio.high:.2f}"
    if ratio.items < intervals.FEWEST:
        known = f" ({between})" if math.isfinite(ratio.low) else ""
        return f"{what} {ratio.value:.2f} times as fast{known}; {ratio.items} turns are few"
    if ratio.low <= 1.0 <= ratio.high:
        return f"{what}: no difference of speed seen, ratio {ratio.value:.2f} ({between})"
    return f"{what} {ratio.value:.2f} times as fast as the teacher ({between})"
