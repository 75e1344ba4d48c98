"""Walks within a budget of memory: the same numbers, whatever is given up for it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import moe_model_types, token_ids
from moeprune.core.memory import Decision, Sizes
from moeprune.errors import BudgetError, MoepruneError
from moeprune.models import bounds
from moeprune.models import walk as walking
from moeprune.models.bounds import Limits, Load, bounded, share, sizes_of
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.expert_ranges import whole_only
from moeprune.models.hidden import HiddenStates
from moeprune.models.loading import LayeredModel
from moeprune.models.ranks import Ranks
from moeprune.models.walk import Batch, Walk

Tiny = Callable[[str], Path]

EVERYTHING = ("routing", "inputs", "hidden", "outputs", "router", "sample", "hidden-gram")
PAGE = mmap.PAGESIZE
WHOLE = {"dbrx", "llama4_text", "longcat_flash", "zaya"}
"""Families whose experts are never loaded some at a time."""


def batches(padded: bool = True) -> list[Batch]:
    mask = (torch.arange(24) >= torch.tensor([5, 0])[:, None]).long() if padded else None
    keys = torch.arange(48).view(2, 24) * 7919 % 100_003
    return [
        Batch(token_ids(2, 24, seed=1), keys),
        Batch(token_ids(2, 24, seed=2), keys + 1, mask),
        Batch(token_ids(1, 9, seed=3), keys[:1, :9] + 2),
    ]


def opened(directory: Path) -> LayeredModel:
    return LayeredModel(Checkpoint.open(directory), torch.float32)


def run(
    model: LayeredModel, needs: Sequence[str], way: Decision | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Logits and statistics of a walk that goes ``way``."""
    found: dict[str, Tensor] = {}

    def decided(
        model: LayeredModel, load: Load, ranks: Ranks
    ) -> tuple[Decision, HiddenStates | None]:
        assert way is not None
        stays = way.in_memory >= len(load.tokens)
        return way, None if stays else HiddenStates(None, way.in_memory, smallest=1)

    def visit(site: object, statistics: object) -> bool:
        parts = statistics.to_tensors()  # type: ignore[attr-defined]
        found.update({f"{statistics.shape.layer}.{k}": v.clone() for k, v in parts.items()})  # type: ignore[attr-defined]
        return False

    with monkeypatch.context() as patch:
        if way is not None:
            patch.setattr(walking, "bounded", decided)
        with Walk(model, batches(), 2, chunks=True) as walk:
            walk.layers(needs, visit)
            walk.logits(lambda index, value: found.update({f"logits {index}": value.clone()}))
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name, equal_nan=True)


FILED = Decision(in_memory=1, prefetch=False, workers=1, chunk=10**9)
CHUNKED = Decision(in_memory=0, prefetch=False, workers=2, chunk=3)


def families(*quick: str) -> list[object]:
    """All families; but for some of every kind they are many and take long."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=() if n in quick else slow) for n in moe_model_types()]


@pytest.mark.parametrize("model_type", families("olmoe", "deepseek_v4", "inkling2_text", "jamba"))
def test_hidden_states_in_a_file(
    model_type: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prefetch, another number of workers, states in a file: logits bit for bit."""
    expected = run(opened(tiny(model_type)), (), None, monkeypatch)
    assert_same(run(opened(tiny(model_type)), (), FILED, monkeypatch), expected)


@pytest.mark.parametrize("model_type", families("olmoe", "deepseek_v4", "nemotron_h", "zaya"))
def test_experts_some_at_a_time(
    model_type: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and every sum, bit for bit those of the observed walk in one piece."""
    model = opened(tiny(model_type))
    why = whole_only(model)
    if why is not None or not model.sites:
        assert why is None or model_type in WHOLE, why
        return
    assert model_type not in WHOLE
    expected = run(model, EVERYTHING, None, monkeypatch)
    assert_same(run(opened(tiny(model_type)), EVERYTHING, CHUNKED, monkeypatch), expected)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss"])
def test_quantised_experts_some_at_a_time(
    model_type: str, twin: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block-scaled fp8 by experts, and MXFP4 of all of them: decoded in ranges as in one piece."""
    expected = run(opened(twin(model_type)), EVERYTHING, None, monkeypatch)
    assert_same(run(opened(twin(model_type)), EVERYTHING, CHUNKED, monkeypatch), expected)


# ---- decisions from a model's own sizes ----------------------------------------------------------


def limited(directory: Path, memory: int, told: list[str] | None = None) -> LayeredModel:
    model = opened(directory)
    tell = (lambda text: None) if told is None else told.append
    model.limits = Limits(memory, tell=tell)
    return model


def logits_of(model: LayeredModel, chunks: bool = True) -> list[Tensor]:
    found: list[Tensor] = []
    with Walk(model, batches(False), 2, chunks=chunks) as walk:
        walk.layers()
        walk.logits(lambda index, value: found.append(value.clone()))
    return found


def sizes(directory: Path, **given: Any) -> Sizes:
    tokens = [tuple(batch.ids_BL.shape) for batch in batches(False)]
    return sizes_of(opened(directory), Load(tokens, 2, **given))  # type: ignore[arg-type]


def test_plenty_changes_nothing(tiny: Tiny) -> None:
    told: list[str] = []
    found = logits_of(limited(tiny("olmoe"), 1 << 40, told))
    assert all(map(torch.equal, found, logits_of(opened(tiny("olmoe")))))
    assert len(told) == 1
    assert "hidden states in memory; next layer read ahead; 2 batches at once" in told[0]


def test_too_little_is_refused_before_anything_is_loaded(tiny: Tiny) -> None:
    model = limited(tiny("olmoe"), 1 << 20)
    with pytest.raises(BudgetError, match="1MiB is too small"):
        logits_of(model)
    assert not model.is_resident
    with pytest.raises(MoepruneError, match="on the CPU"):
        model.device = torch.device("meta")
        logits_of(model)


def test_sizes_are_those_of_the_tensors(tiny: Tiny) -> None:
    """Of olmoe, whose experts are stored one by one and read into their places one by one."""
    model = opened(tiny("olmoe"))
    found = sizes(tiny("olmoe"), chunks=True)
    model.load_layer(0)
    assert found.layer == sum(p.nbytes for p in model.layers[0].parameters())
    experts = sum(p.nbytes for p in model.sites[0].experts.parameters())
    assert found.layer - found.rest == experts
    tensors = model.checkpoint.tensors.items()
    assert found.source == max(info.nbytes for key, info in tensors if ".experts." in key)
    model.load_resident()
    outside = [p for n, p in model.model.named_parameters() if ".layers." not in n]
    assert found.resident == sum(p.nbytes for p in outside)
    head = 32 // model.config.num_attention_heads
    assert found.hidden == 48 * (3 * 32 + 2 * head) * 4
    assert found.chunks
    assert sizes(tiny("gpt_oss")).source == 0  # mapped as they are
    assert not sizes(tiny("dbrx"), chunks=True).chunks
    assert not sizes(tiny("olmoe"), chunks=False).chunks


def test_the_work_of_experts_is_not_counted_twice(tiny: Tiny) -> None:
    """A walk that observes chunks never runs the model's own experts, which take all slots at once.

    Llama 4 gives every token to every expert, which a count of the chosen ones would miss.
    """
    of = {"needs": ("routing",)}
    assert sizes(tiny("olmoe"), chunks=True, **of).work < sizes(tiny("olmoe"), **of).work
    model = opened(tiny("llama4_text"))
    shape = next(iter(model.sites.values())).shape
    every = 48 * shape.experts * (shape.hidden + 4 * shape.intermediate) * 4
    assert sizes(tiny("llama4_text")).work >= every


@pytest.mark.parametrize(("model_type", "least"), [("olmoe", 0.98), ("gpt_oss", 0.9)])
def test_states_between_layers_are_as_large_as_that(
    model_type: str, least: float, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks of eager attention (gpt_oss) and tables of positions are moved, and are counted."""
    store = HiddenStates(tmp_path, smallest=1)
    monkeypatch.setattr(walking, "bounded", lambda model, load, ranks: (FILED, store))
    model = opened(tiny(model_type))
    batch = Batch(token_ids(1, 600, seed=1), torch.arange(600)[None])
    with Walk(model, [batch], 1) as walk:
        walk.layers()
        expected = sizes_of(model, Load([(1, 600)], 1)).hidden
    assert least * expected < store.nbytes < expected + 8 * PAGE


def test_edits_stand_beside_what_they_change(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_process", lambda: 0)
    experts = sum(p.nbytes for p in opened(tiny("gpt_oss")).sites[0].experts.parameters())
    needs = ("routing",)
    assert sizes(tiny("gpt_oss"), needs=needs).source == experts
    assert sizes(tiny("gpt_oss"), needs=needs, chunks=True).source == 0
    plain, branched = sizes(tiny("gpt_oss")), sizes(tiny("gpt_oss"), needs=needs, shared=True)
    assert branched.base == plain.base + experts
    assert branched.logits == plain.logits > 0
    assert branched.statistics > 0


def test_logits_are_counted_with_what_they_are_compared_with(tiny: Tiny) -> None:
    models = [limited(tiny("olmoe"), 1 << 40) for _ in range(2)]
    load = Load([(2, 24)], 2)
    share(models, load, 8)
    values = 48 * models[0].config.vocab_size
    assert sizes_of(models[0], load).logits == values * (2 * 4 + 8)


def test_processes_agree_on_experts_some_at_a_time(tiny: Tiny) -> None:
    """One that would have room for all loads as few as the others, and files what that takes."""

    class Crowded(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value, 3]

    load = Load([(2, 24)] * 4, 2, chunks=True)
    way, hidden = bounded(limited(tiny("olmoe"), 1 << 40), load, Crowded())
    assert (way.in_memory, way.chunk) == (0, 3)
    assert hidden is not None
    hidden.close()


def test_a_visit_cannot_change_weights_that_are_not_there(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "bounded", lambda model, load, ranks: (CHUNKED, None))
    with (
        Walk(opened(tiny("olmoe")), batches(), chunks=True) as walk,
        pytest.raises(BudgetError, match="weights cannot be changed"),
    ):
        walk.layers(["routing"], lambda site, statistics: True)


def test_branches_share_states_in_the_file(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that hand their states to each other are all in memory, or none."""
    load = Load([(2, 24)] * 4, 2, shared=True)
    model = limited(tiny("olmoe"), 1 << 40)
    some = Decision(2, True, 2, 8)
    monkeypatch.setattr(bounds, "decide", lambda *_: some)
    way, hidden = bounded(model, load)
    assert way.in_memory == 0
    assert hidden is not None
    hidden.close()
