"""The loss of expert-kd against loops over tokens; which experts it compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeprune import load
from moeprune.models.checkpoint import Checkpoint
from moeprune.recovery.experts import ExpertPairs
from moeprune.recovery.groups import parameters_of
from moeprune.recovery.learner import Learner
from moeprune.recovery.pairing import pair

IDS = torch.randint(3, 6000, (3, 16), generator=torch.Generator().manual_seed(0))


def calls_of(model: Any, experts: nn.Module) -> tuple[Tensor, Tensor]:
    """What the experts are given on IDS: inputs and choice."""
    seen = []
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    return seen[0][0].double(), seen[0][1]


def expert(experts: Any, e: int, x: Tensor) -> Tensor:
    """A gated expert in float64, from the formula."""
    gate, up = experts.gate_up_proj[e].detach().double().chunk(2)
    return experts.down_proj[e].detach().double() @ (nn.functional.silu(gate @ x) * (up @ x))


def reference(student: Any, teacher: Any, groups: Any, target: str) -> float:
    total = 0.0
    mine, other = parameters_of(student).sites, parameters_of(teacher).sites
    for layer in mine:
        x_TH, index_TK = calls_of(student, mine[layer].experts)
        their_TH, their_TK = calls_of(teacher, other[layer].experts)
        for e, group in enumerate(groups[layer]):
            squares = []
            for t in range(len(x_TH)):
                if e not in index_TK[t].tolist():
                    continue
                x = x_TH[t]
                if target == "stream":
                    if not set(group) & set(their_TK[t].tolist()):
                        continue
                    x = their_TH[t]
                wanted = sum(w * expert(other[layer].experts, g, x) for g, w in group.items())
                got = expert(mine[layer].experts, e, x_TH[t])
                squares.append(float(((got - wanted) ** 2).mean()))
            total += sum(squares) / len(squares) if squares else 0.0
    return total


@pytest.mark.parametrize("target", ["local", "stream"])
@pytest.mark.parametrize("kind", ["masked", "dropped", "uneven"])
def test_the_sum_is_that_of_loops_over_tokens(
    students: dict[str, Path], teacher: Path, kind: str, target: str
) -> None:
    student, master = load(students[kind]), load(teacher)
    mine, other = parameters_of(student), parameters_of(master)
    groups = pair(
        Checkpoint.open(students[kind]), Checkpoint.open(teacher), mine.sites, other.sites
    )
    wanted = reference(student, master, groups, target)
    plain = student(IDS, use_cache=False).logits
    pairs = ExpertPairs(mine.sites, other.sites, groups, target)
    found = Learner(student, master, pairs, target == "stream", False)(IDS)
    error = float((found["error"].detach() / found["count"].clamp(min=1)).sum())
    assert error == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    assert (wanted > 0) == (kind == "masked" or target == "stream")
    torch.testing.assert_close(student(IDS, use_cache=False).logits, plain)


def test_a_token_that_goes_to_novices_alone_is_nobodys(
    students: dict[str, Path], teacher: Path
) -> None:
    student, master = load(students["novices"]), load(teacher)
    mine, other = parameters_of(student), parameters_of(master)
    groups = pair(
        Checkpoint.open(students["novices"]), Checkpoint.open(teacher), mine.sites, other.sites
    )
    plain = student(IDS, use_cache=False).logits
    pairs = ExpertPairs(mine.sites, other.sites, groups, "local")
    found = Learner(student, master, pairs, False, False)(IDS)
    assert float(found["error"].detach().sum()) == pytest.approx(
        0, abs=1e-9
    )  # kept experts are whole
    assert 0 < float(found["count"].sum()) < IDS.numel() * 2 * 2
    torch.testing.assert_close(student(IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("kind", ["masked", "dropped", "uneven", "novices"])
def test_kept_ids_pair(students: dict[str, Path], teacher: Path, kind: str) -> None:
    sites = parameters_of(load(students[kind])).sites
    groups = pair(
        Checkpoint.open(students[kind]),
        Checkpoint.open(teacher),
        sites,
        parameters_of(load(teacher)).sites,
    )
    layers = json.loads((students[kind] / "moeprune_plan.json").read_text())["layers"]
    assert {i: [e for (e,) in g] for i, g in groups.items()} == {
        int(i): layer["keep"] for i, layer in layers.items()
    }


class Site:
    class shape:
        experts, groups = 6, 1

        @staticmethod
        def group_of(e: int) -> int:
            return 0


def test_an_expert_that_answers_for_others_pairs_with_all_of_them() -> None:
    from moeprune.recovery.pairing import _slots

    served = {"keep": [1, 4], "replaced": [], "served_by": [1, 1, 4, 4, 4, 1]}
    third = pytest.approx(1 / 3)
    assert _slots(served, 2, Site) == (
        {0: third, 1: third, 5: third},
        {2: third, 3: third, 4: third},
    )
    assert _slots({"keep": [1, 4], "replaced": []}, 3, Site) == ({1: 1.0}, {4: 1.0}, {})  # a pad
    assert _slots({}, 6, Site) == tuple({e: 1.0} for e in range(6))


def test_a_merged_expert_pairs_with_its_group(students: dict[str, Path], teacher: Path) -> None:
    student, master = load(students["merged"]), load(teacher)
    mine, other = parameters_of(student), parameters_of(master)
    groups = pair(
        Checkpoint.open(students["merged"]), Checkpoint.open(teacher), mine.sites, other.sites
    )
    layers = json.loads((students["merged"] / "moeprune_plan.json").read_text())["layers"]
    for layer, own in groups.items():
        entry = layers[str(layer)]
        assert entry.get("served_by") is None
        joins, shares = entry["scores"]["joins"], entry["scores"]["share"]
        for core, group in zip(entry["keep"], own, strict=True):
            assert set(group) == {e for e, c in enumerate(joins) if c == core}
            assert group == pytest.approx({e: shares[e] for e in group})
            assert sum(group.values()) == pytest.approx(1)
        assert {len(group) for group in own} > {1}
    pairs = ExpertPairs(mine.sites, other.sites, groups, "local")
    found = Learner(student, master, pairs, False, False)(IDS)
    error = float((found["error"].detach() / found["count"].clamp(min=1)).sum())
    assert error == pytest.approx(reference(student, master, groups, "local"), rel=1e-4)


@pytest.mark.parametrize("scores", [{"joins": [0.0] * 6}, {"joins": [1.0, 1, 4, 4, 4]}])
def test_groups_that_are_not_those_of_the_kept(scores: dict[str, list[float]]) -> None:
    from moeprune.recovery.pairing import _slots

    with pytest.raises(ValueError, match="join others"):
        _slots({"keep": [1, 4], "scores": scores}, 2, Site)
