"""Who is measured when, and what is made of the seconds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moeprune.evaluation.speed import Meter, Sample, rates, speed_verdict, speedup, take_turns


class Talker:
    """Calls the logits processor once for every new token, like ``generate``."""

    device = torch.device("cpu")

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log
        self.generation_config: Any = "its own"

    def generate(self, ids_BL: torch.Tensor, logits_processor: Any, **_: Any) -> None:
        self.log.append((self.name, int(ids_BL[0, 0])))
        assert not self.generation_config.do_sample
        assert self.generation_config.eos_token_id is None, "an end token would end a turn"
        for _number in range(self.generation_config.max_new_tokens):
            logits_processor(ids_BL, torch.zeros(1, 3))


def test_models_take_turns_on_the_same_prompts() -> None:
    log: list[tuple[str, int]] = []
    models = {name: Talker(name, log) for name in "AB"}
    prompts = [torch.full((1, 4), n) for n in range(3)]
    begun: list[int] = []
    meter = Meter(lambda: begun.append(1), lambda: (len(begun), None))
    steps: list[tuple[int, int]] = []
    found = take_turns(models, prompts, 5, 2, meter, lambda *step: steps.append(step))
    assert log == [(name, prompt) for prompt in (0, 0, 0, 1, 2) for name in "AB"]
    assert [sample.working for sample in found["A"]] == [5, 7, 9], "turns of warm-up do not count"
    assert [sample.working for sample in found["B"]] == [6, 8, 10]
    assert all(s.prefill > 0 and s.decode > 0 for samples in found.values() for s in samples)
    assert steps[-1] == (10, 10) and models["A"].generation_config == "its own"


def test_rates_are_medians() -> None:
    samples = [
        Sample(0.5, 2.0, 100, 6.0),
        Sample(1.0, 4.0, 300, 9.0),
        Sample(9.0, 99.0, None, None),
    ]
    found = rates(samples, (2, 10), 5)
    assert found["prefill_tokens_per_second"] == 20 / 1.0
    assert found["decode_tokens_per_second"] == 2 * 4 / 4.0
    assert found["working_bytes"] == 200 and found["joules_per_token"] == 7.5 / 10


def test_a_ratio_is_paired_by_turns() -> None:
    """The machine is ten times slower in some turns; the ratio does not see it."""
    slow = [1.0, 10.0] * 6
    ratio = speedup([s * 0.5 for s in slow], slow)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (
        speed_verdict(ratio, "decode") == "decode 2.00 times as fast as the teacher (2.00 to 2.00)"
    )
    noisy = speedup([1.0, 2.0] * 6, [2.0, 1.0] * 6)
    assert noisy.value == pytest.approx(1.0) and noisy.low < 1.0 < noisy.high
    assert math.isclose(noisy.low * noisy.high, 1.0)
    assert "no difference of speed seen" in speed_verdict(noisy, "decode")
    assert "nan" not in speed_verdict(speedup([1.0, 1.1], [2.0, 1.9]), "decode")
    assert "4 turns are few" in speed_verdict(speedup([1.0] * 4, [2.0] * 4), "decode")
