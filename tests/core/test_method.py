"""The registry of methods, their options, and a method from outside the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from families import save_tiny
from moeprune.core import method as registry
from moeprune.core.budget import Budget, removable
from moeprune.core.method import Context, LayerView, Method, make_method, methods, register
from moeprune.core.plan import LayerPlan
from moeprune.errors import BudgetError, MoepruneError
from moeprune.methods.moe_pruner import MoEPruner
from moeprune.methods.moeits import MoEITS
from moeprune.methods.mone import MoNE
from moeprune.pipeline import stages


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of this test alone."""
    monkeypatch.setattr(registry, "_REGISTRY", registry._Registry())
    yield


def toy() -> type[Method]:
    @register
    @dataclass(frozen=True)
    class KeepFirst(Method):
        """Keeps the first experts."""

        name: ClassVar[str] = "keep-first"
        summary: ClassVar[str] = "for tests"
        source: ClassVar[str] = "none"
        budgets: ClassVar[tuple[str, ...]] = ("keep",)

        reverse: bool = False
        by: Literal["id", "norm"] = "id"

        def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
            E = view.shape.experts
            kept = E - removable(context.budget, view.shape)
            norms = [float(view.weights.matrix(e, "down").norm()) for e in range(E)]
            context.warn(f"layer {view.shape.layer} seen")
            keep = tuple(range(E - kept, E) if self.reverse else range(kept))
            return LayerPlan(view.shape.layer, E, keep, scores={"norm": tuple(norms)})

    return KeepFirst


def test_the_founding_methods_are_found_by_entry_point(fresh_registry: None) -> None:
    found = methods()
    assert {"moe-pruner": MoEPruner, "moeits": MoEITS, "mone": MoNE}.items() <= found.items()
    assert list(found) == sorted(found)
    for name, kind in found.items():
        assert kind.name == name
        assert kind.summary and kind.source and kind.budgets


def test_a_registered_method_plans_and_is_applied(fresh_registry: None, tmp_path: Path) -> None:
    kind = toy()
    assert methods()["keep-first"] is kind
    assert "mone" in methods()  # entry points are still there
    model = save_tiny("olmoe", tmp_path / "model")
    made = stages.plan(model, "keep-first", Budget(keep=3), options={"reverse": "true"})
    assert {layer.keep for layer in made.layers.values()} == {(5, 6, 7)}
    assert made.options == {"reverse": True, "by": "id"}
    assert (made.method, made.statistics) == ("keep-first", {})
    assert made.warnings == tuple(f"layer {i} seen" for i in range(4))
    norm = stages.plan(model, kind(), Budget(keep=3)).layers[0].scores["norm"]
    assert norm == made.layers[0].scores["norm"] and len(set(norm)) == 8
    assert stages.apply(model, made, tmp_path / "out").experts == (32, 12)
    with pytest.raises(BudgetError, match="keep-first has no --ratio"):
        stages.plan(model, "keep-first", Budget(ratio=0.5))


def test_a_broken_plugin_is_named(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("bad", "no_such_module:Bad", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(MoepruneError, match=r"method 'bad' \(no_such_module:Bad\) cannot be load"):
        methods()


def test_unknown_method() -> None:
    with pytest.raises(MoepruneError, match="unknown method 'moepruner'") as caught:
        make_method("moepruner")
    assert caught.value.hint.startswith("did you mean 'moe-pruner'?")
    with pytest.raises(MoepruneError, match="unknown method 'zzz'") as caught:
        make_method("zzz")
    assert "moeits" in caught.value.hint and "mone" in caught.value.hint


def test_unknown_option() -> None:
    with pytest.raises(MoepruneError, match="moe-pruner has no option 'propogate'") as caught:
        make_method("moe-pruner", {"propogate": "dense"})
    assert caught.value.hint == "did you mean 'propagate'? known: min_tokens, propagate"


@pytest.mark.parametrize("option", ["name", "needs", "budgets"])
def test_what_describes_a_class_is_no_option(option: str) -> None:
    with pytest.raises(MoepruneError, match=f"mone has no option '{option}'") as caught:
        make_method("mone", {option: "x"})
    assert caught.value.hint.endswith("known: normalise, novice, routing, scope, score")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("moe-pruner", {"min_tokens": "3", "propagate": "dense"}, MoEPruner("dense", 3)),
        ("moeits", {"bins": "256"}, MoEITS(bins=256)),
        ("moeits", {"bins": "auto", "floor": "4"}, MoEITS(floor=4)),
        ("moeits", {"matrix_weights": "up-down"}, MoEITS(matrix_weights="up-down")),
        ("mone", {"routing": "count", "scope": "global"}, MoNE(routing="count", scope="global")),
        ("mone", {}, MoNE()),
    ],
)
def test_options_are_parsed_from_text(name: str, text: dict[str, str], value: Method) -> None:
    made = make_method(name, text)
    assert made == value
    assert set(text) <= set(made.options())
    assert make_method(name, made.options()) == made  # as they stand in a plan


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moe-pruner", {"min_tokens": "few"}, "moe-pruner, option min_tokens: .*integer"),
        ("moe-pruner", {"min_tokens": "-1"}, "moe-pruner, option min_tokens: .*greater"),
        ("mone", {"routing": "gates"}, "mone, option routing: .*'gate-mass'"),
        ("moeits", {"bins": "1"}, "moeits, option bins.*greater"),
        ("moeits", {"bins": "100000"}, "moeits, option bins.*less"),
        ("moeits", {"floor": "-2"}, "moeits, option floor: .*greater"),
    ],
)
def test_values_that_do_not_fit(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(MoepruneError, match=message):
        make_method(name, options)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("moe-pruner", {"ratio", "pattern"}),
        ("moeits", {"ratio", "keep", "tau"}),
        ("mone", {"ratio", "keep"}),
    ],
)
def test_budgets(name: str, accepted: set[str]) -> None:
    for budget in (Budget(ratio=0.5), Budget(keep=4), Budget(tau=1.0), Budget(pattern=(2, 4))):
        if budget.kind in accepted:
            make_method(name).accept(budget)
        else:
            with pytest.raises(BudgetError, match=f"{name} has no --{budget.kind}"):
                make_method(name).accept(budget)


def test_only_pruned_propagation_is_sequential() -> None:
    found = {name: make_method(name).sequential for name in ("mone", "moeits", "moe-pruner")}
    assert found == {"mone": False, "moeits": False, "moe-pruner": True}
    assert not MoEPruner(propagate="dense").sequential


def test_a_method_that_needs_statistics_says_so(tmp_path: Path) -> None:
    model = save_tiny("olmoe", tmp_path / "model")
    for method, hint in ((MoNE(), "--statistics"), (MoEPruner("dense"), "--statistics")):
        with pytest.raises(MoepruneError, match="there are no statistics") as caught:
            stages.plan(model, method, Budget(ratio=0.5))
        assert hint in caught.value.hint
    with pytest.raises(MoepruneError, match="walks the model") as caught:
        stages.plan(model, MoEPruner(), Budget(ratio=0.5))
    assert "propagate=dense" in caught.value.hint
