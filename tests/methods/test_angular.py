"""Angular layer dropping: angles against loops over the whole model, the choice, and the files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.conftest import LENGTH, SEQUENCES, batch_of, calibration_ids
from moeprune.core import residual as core_residual
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.residual import Residual, angles
from moeprune.errors import BudgetError, DataError, MoepruneError
from moeprune.methods.angular import Angular
from moeprune.models import residual as models_residual
from moeprune.models.data import token_keys
from moeprune.models.loading import find_layers
from moeprune.models.store import StatisticsStore, merge_statistics
from moeprune.pipeline import stages
from moeprune.pipeline.verification import verify
from support import logits, open_stock

COMPUTE = stages.Compute(dtype="float32", workers=2)


def stream_of(model: Any, ids_NL: Tensor) -> list[Tensor]:
    """The input of every layer and the output of the last, [N, L, H] each."""
    seen: list[Tensor] = []
    layers = find_layers(model)[1]
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        for layer in layers
    ]
    hooks.append(
        layers[-1].register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    )
    with torch.no_grad():
        model(ids_NL, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def angle(a: Tensor, b: Tensor) -> float:
    x, y = a.double().tolist(), b.double().tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    cos = dot / math.sqrt(sum(p * p for p in x)) / math.sqrt(sum(q * q for q in y))
    return math.acos(max(-1.0, min(1.0, cos))) / math.pi


def made_of(mean: list[list[float]], tokens: int = 3) -> Residual:
    one = torch.tensor(mean)[None].repeat(tokens, 1, 1)
    return Residual(torch.arange(tokens), one, torch.arange(2), one[:2] * 1.0)


def chosen(angles_DD: list[list[float]], budget: Budget, **options: Any) -> tuple[int, ...]:
    return Angular(**options).plan_depth(made_of(angles_DD), Context(budget))


FIVE = [  # angles between six points of five layers
    [0.0, 0.3, 0.4, 0.2, 0.5, 0.6],
    [0.3, 0.0, 0.1, 0.3, 0.2, 0.5],
    [0.4, 0.1, 0.0, 0.1, 0.4, 0.1],
    [0.2, 0.3, 0.1, 0.0, 0.1, 0.1],
    [0.5, 0.2, 0.4, 0.1, 0.0, 0.05],
    [0.6, 0.5, 0.1, 0.1, 0.05, 0.0],
]


def test_the_run_that_turns_least_goes() -> None:
    assert chosen(FIVE, Budget(ratio=0.2)) == (1,)  # of equals the first
    assert chosen(FIVE, Budget(ratio=0.2), last_layer=True) == (4,)
    assert chosen(FIVE, Budget(ratio=0.4)) == (1, 2)  # 0.3; the others 0.4, 0.4
    assert chosen(FIVE, Budget(keep=3)) == (1, 2)
    assert chosen(FIVE, Budget(keep=2)) == (0, 1, 2)  # 0.2, of 0.2 and 0.2
    assert chosen(FIVE, Budget(keep=2), last_layer=True) == (2, 3, 4)
    assert chosen(FIVE, Budget(ratio=0.19)) == () == chosen(FIVE, Budget(keep=5))
    assert chosen(FIVE, Budget(keep=1)) == (0, 1, 2, 3)


def test_budgets_that_are_none() -> None:
    for keep in (0, 6):
        with pytest.raises(BudgetError, match="has 5 decoder layers"):
            chosen(FIVE, Budget(keep=keep))
    with pytest.raises(BudgetError, match="--multiple-of means nothing"):
        Angular().accept(Budget(ratio=0.5, multiple_of=8))


def test_what_is_not_finite_stays() -> None:
    broken = [list(row) for row in FIVE]
    broken[1][2] = math.nan
    warnings: list[str] = []
    context = Context(Budget(ratio=0.2), warn=warnings.append)
    assert Angular().plan_depth(made_of(broken), context) == (2,)
    assert warnings[0].startswith("the residual stream is not finite")
    with pytest.raises(BudgetError, match="not finite anywhere"):
        chosen([[math.nan] * 6] * 6, Budget(ratio=0.2))


def test_angles_are_arccos_over_pi() -> None:
    x_DSC = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    x_DSC[2, 1] = -3 * x_DSC[0, 1]
    x_DSC[3, 2] = 2 * x_DSC[0, 2]
    found = angles(x_DSC)
    for s in range(5):
        for i in range(4):
            for j in range(4):
                assert abs(float(found[s, i, j]) - angle(x_DSC[i, s], x_DSC[j, s])) < 1e-6
    assert float(found[1, 0, 2]) == pytest.approx(1.0)
    assert float(found[2, 0, 3]) == pytest.approx(0.0, abs=1e-6)
    assert angles(torch.zeros(2, 1, 4)).tolist() == [[[0.0, 0.5], [0.5, 0.0]]]


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_walk_gives_the_angles_of_the_whole_model(
    model_type: str, tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    """Dense layers too; the sample is the tokens with the smallest keys."""
    source = tiny(model_type)
    store = stages.calibrate(source, tmp_path / "s", text, ("residual",), COMPUTE)
    found = store.residual()
    assert found.layers == 4 and store.manifest["collect"] == ["residual", "routing"]
    ids = calibration_ids(source, text)
    points = stream_of(open_stock(source), ids)
    keys = token_keys(ids, text.seed)
    size = min(models_residual.SAMPLE_SIZE, keys.numel())
    assert sorted(found.key_S.tolist()) == sorted(keys.reshape(-1).tolist())[:size]
    assert sorted(found.last_key_Q.tolist()) == sorted(keys[:, -1].tolist())
    place = {int(key): divmod(i, LENGTH) for i, key in enumerate(keys.reshape(-1).tolist())}
    for key, angle_SDD in (
        (found.key_S, found.angle_SDD),
        (found.last_key_Q, found.last_angle_QDD),
    ):
        for s in range(0, len(key), 7):
            n, t = place[int(key[s])]
            for i, j in ((0, 1), (1, 4), (2, 3)):
                expected = angle(points[i][n, t], points[j][n, t])
                assert abs(float(angle_SDD[s, i, j]) - expected) < 1e-4
    assert len(found.last_key_Q) == SEQUENCES


def test_batches_change_nothing_and_merging_is_one_run(
    tiny: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny("mixtral")
    for module in (core_residual, models_residual):
        monkeypatch.setattr(module, "SAMPLE_SIZE", 40)
    whole = stages.calibrate(source, tmp_path / "a", text, ("residual",), COMPUTE).residual()
    with batch_of(monkeypatch, 3 * LENGTH):
        cut = stages.calibrate(source, tmp_path / "b", text, ("residual",), COMPUTE).residual()
    for (name, one), (_, two) in zip(whole.tensors(), cut.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3, msg=name)
    other = stages.Text(text.sources, SEQUENCES, LENGTH, seed=2)
    stages.calibrate(source, tmp_path / "c", other, ("residual",), COMPUTE)
    merged = merge_statistics([tmp_path / "a", tmp_path / "c"], tmp_path / "m").residual()
    keys = [StatisticsStore.open(tmp_path / name).residual().key_S for name in "ac"]
    assert merged.key_S.tolist() == sorted(torch.cat(keys).tolist())[:40]
    short = made_of([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(MoepruneError, match="angles of 4 and of 1 layers"):
        merged.merge(short)


@pytest.mark.parametrize("budget", [Budget(ratio=0.25), Budget(keep=2)])
def test_from_text_to_checkpoint(
    budget: Budget, tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    source = tiny("qwen2_moe")
    done = stages.prune(source, Angular(tokens="all"), budget, tmp_path / "out", text)
    dropped = done.plan.drop_layers
    assert len(dropped) == (1 if budget.ratio else 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 - len(dropped)
    assert bool(logits(open_stock(tmp_path / "out")).isfinite().all())
    assert verify(tmp_path / "out", against=source).passed()
    assert f"layers {dropped[0]}..{dropped[-1]} turn" in done.plan.warnings[-1]
    stages.save_plan(done.plan, tmp_path / "plan.json")
    stages.apply(source, tmp_path / "plan.json", tmp_path / "again")
    one, two = (tmp_path / name / "config.json" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_statistics_without_the_stream(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    source = tiny("mixtral")
    stages.calibrate(source, tmp_path / "s", text, ("routing",), COMPUTE)
    half = Budget(ratio=0.5)
    with pytest.raises(DataError, match="do not hold 'residual'") as caught:
        stages.plan(source, "angular", half, tmp_path / "s")
    assert caught.value.hint == "calibrate again with --collect residual,routing"
    with pytest.raises(MoepruneError, match="there are no statistics"):
        stages.plan(source, "angular", half)


def test_damaged_angles_are_refused(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    stages.calibrate(tiny("mixtral"), tmp_path / "s", text, ("residual",), COMPUTE)
    file = tmp_path / "s" / "residual.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\x00" * 8)
    with pytest.raises(DataError, match=r"residual stream in .* are damaged"):
        StatisticsStore.open(tmp_path / "s")
    with pytest.raises(MoepruneError, match="angles of shape"):
        Residual.from_tensors(dict(made_of(FIVE).tensors()), 4)
    with pytest.raises(MoepruneError, match="are missing"):
        Residual.from_tensors({}, 4)
