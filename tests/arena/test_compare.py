"""A comparison measures what the stages measure, goes on where it stopped, and never mixes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from moeprune import (
    Budget,
    Compute,
    Grid,
    Method,
    MoepruneError,
    Text,
    apply,
    calibrate,
    compare,
    evaluate,
    plan,
    read_plan,
)
from moeprune.core.method import Context, LayerView
from moeprune.core.plan import LayerPlan
from moeprune.errors import OutputError
from moeprune.models.data import demo_text
from moeprune.models.store import StatisticsStore, merge_statistics
from moeprune.pipeline.arena import cell as arena_cell
from moeprune.pipeline.arena.asking import calibrations, parse_methods
from moeprune.pipeline.arena.estimate import spoken
from moeprune.pipeline.arena.state import open_run
from moeprune.pipeline.gathering import gather
from moeprune.pipeline.reporting import report
from support import tree

Compared = tuple[Path, dict[str, Any]]


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {key.partition(" seed")[0]: row for key, row in result["cells"].items()}


# --- what is asked


def test_methods_are_parsed() -> None:
    entries = parse_methods("mone:scope=global,routing=count,moeits, moe-pruner:propagate=dense")
    assert [entry.label for entry in entries] == [
        "mone:scope=global,routing=count", "moeits", "moe-pruner:propagate=dense",
    ]  # fmt: skip
    assert entries[0].method.options()["routing"] == "count"
    assert {"mone", "moeits", "moe-pruner"} <= {entry.label for entry in parse_methods("all")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no method"), ("mone,mone", "twice"), ("scope=global", "belongs to no method"),
        ("mone:scope", "is no option"), ("mone:scope=x", "option scope"), ("mona", "unknown"),
        ("all,mone", "twice"),
    ],
)  # fmt: skip
def test_bad_methods(text: str, says: str) -> None:
    with pytest.raises(MoepruneError, match=says):
        parse_methods(text)


def test_calibration_texts_are_shared_out() -> None:
    asked = calibrations(Text(), ("english+french", "all"), (3, 12))
    assert [one.name for one in asked] == [
        "english+french-3", "english+french-12", "all-3", "all-12",
    ]  # fmt: skip
    assert [(name, text.sequences) for name, text in asked[0].parts] == [
        ("english-2", 2), ("french-1", 1),
    ]  # fmt: skip
    assert len(asked[3].parts) == len(demo_text("calibration"))
    with pytest.raises(MoepruneError, match="no calibration text"):
        calibrations(Text(), ("klingon",), ())


# --- what is measured


def test_every_cell_is_a_row(compared: Compared) -> None:
    _, result = compared
    rows = by_name(result)
    assert len(rows) == 12 == len(result["order"])
    done = {name for name, row in rows.items() if row["status"] == "done"}
    assert done == {
        "mone ratio=0.5", "mone ratio=0.95", "mone:scope=global ratio=0.5",
        "mone:scope=global ratio=0.95", "moeits ratio=0.5", "moe-pruner:propagate=dense ratio=0.5",
        "moe-pruner:propagate=dense ratio=0.95", "moe-pruner:propagate=dense pattern=2:4",
    }  # fmt: skip
    assert "leaves 2 of 32 experts" in rows["moeits ratio=0.95"]["reason"]
    assert rows["mone pattern=2:4"]["reason"] == "mone has no --pattern"
    kinds = {name.partition(" ")[0]: row["kind"] for name, row in rows.items() if row["kind"]}
    assert kinds == {
        "mone": "novices", "mone:scope=global": "novices", "moeits": "dropping",
        "moe-pruner:propagate=dense": "inside",
    }  # fmt: skip


def test_rows_are_what_the_stages_give(
    compared: Compared, texts: dict[str, Any], tmp_path: Path
) -> None:
    out, result = compared
    compute = texts["compute"]
    calibrate("demo", tmp_path / "s", texts["text"], compute=compute)
    for name, method, options in (
        ("mone ratio=0.5", "mone", {}),
        ("moe-pruner:propagate=dense ratio=0.5", "moe-pruner", {"propagate": "dense"}),
    ):
        row = by_name(result)[name]
        made = plan("demo", method, Budget(ratio=0.5), tmp_path / "s", None, options, compute)
        kept = read_plan(out / row["plan"])
        assert kept.to_json(None)["layers"] == made.to_json(None)["layers"]
        sizes = apply("demo", made, tmp_path / name)
        measured = evaluate(tmp_path / name, "demo", texts["heldout"], compute)
        again = measured["groups"]["all"]
        assert row["perplexity"] == again["perplexity"] and row["kl"] == again["kl"]
        assert row["agreement"] == again["agreement"]
        assert row["against"] == {name: again["against"][name] for name in row["against"]}
        assert {"loss", "kl"} <= row["against"].keys()
        assert (row["bytes"], row["nonzero_parameters"]) == (sizes.bytes[1], sizes.nonzero[1])
    own = evaluate("demo", None, texts["heldout"], compute)["groups"]["all"]
    assert result["original"]["perplexity"] == own["perplexity"]


def test_nothing_but_the_run_is_left(compared: Compared) -> None:
    out, _ = compared
    names = {path.name for path in out.iterdir()}
    assert names == {"compare.json", "compare.html", "pareto.svg", "plans", "statistics"}


def test_a_group_of_one_gives_the_same(
    compared: Compared, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeprune.pipeline.arena.measuring.MOST", 1)
    _, result = compared
    grid = Grid("mone,moeits", (Budget(ratio=0.5),))
    again = compare("demo", tmp_path / "run", grid, keep_checkpoints=True, **texts)
    assert again["group"] == 1 < result["group"]
    for name, row in by_name(again).items():
        for key in ("perplexity", "kl", "agreement", "plan_sha256", "domains"):
            assert row[key] == by_name(result)[name][key], key
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2


# --- going on, and refusing to


def test_the_same_again_computes_nothing(
    compared: Compared, texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, result = tmp_path / "run", compared[1]
    shutil.copytree(compared[0], out)  # what was asked for last is written anew
    before = tree(out / "plans")

    def never(*args: object, **more: object) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(arena_cell, "make_plan", never)
    monkeypatch.setattr("moeprune.pipeline.arena.measuring.measure_models", never)
    again = compare("demo", out, Grid("mone,moeits", (Budget(ratio=0.5),)), **texts)
    assert again["cells"] == result["cells"] and tree(out / "plans") == before
    assert len(again["order"]) == 2


def test_other_inputs_are_refused(compared: Compared, texts: dict[str, Any]) -> None:
    out, _ = compared
    before = tree(out)
    grid = Grid("mone", (Budget(ratio=0.5),))
    for change, says in (
        ({"heldout": Text(texts["heldout"].sources, 1, 32)}, "held-out text was"),
        ({"text": Text(texts["text"].sources, 4, 32)}, "calibration text all-4 was 4 x 64"),
        ({"compute": Compute(dtype="bfloat16", workers=1)}, "dtype was float32, now bfloat16"),
    ):
        with pytest.raises(OutputError, match=says):
            compare("demo", out, grid, **(texts | change))
    assert tree(out) == before


def test_a_changed_default_is_refused(
    compared: Compared, texts: dict[str, Any], tmp_path: Path
) -> None:
    out, _ = compared
    data = json.loads((out / "compare.json").read_bytes())
    for row in data["cells"].values():
        if row["name"] == "mone":
            row["options"]["scope"] = "global"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/compare.json").write_text(json.dumps(data))
    with pytest.raises(OutputError, match="mone, option scope was global, now layer"):
        compare("demo", tmp_path / "run", Grid("mone", (Budget(ratio=0.5),)), **texts)


def test_a_foreign_directory_is_refused(tmp_path: Path, texts: dict[str, Any]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OutputError):
            compare("demo", tmp_path, Grid("moeits"), force=force, **texts)
    assert tree(tmp_path).keys() == {"notes.txt"}


COMMAND = (
    "import sys; from moeprune.cli.app import main; sys.argv = ['moeprune', *sys.argv[1:]]; main()"
)


def test_halves_of_files_are_taken_away(tmp_path: Path) -> None:
    """Of a process that was killed while it wrote: before the first result, and after it."""
    for name in (".compare.json.x1.partial", "plans/.a.plan.json.x2.partial"):
        half = tmp_path / "run" / name
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"{")
        with open_run(tmp_path / "run", {"model": "m"}) as run:
            assert not half.exists()
            run.save()


def test_kill_and_go_on(tmp_path: Path, english_text: Path, compared: Compared) -> None:
    """kill -9 while it works; the same command then ends with the same rows."""
    out = tmp_path / "run"
    args = [
        sys.executable, "-c", COMMAND, "compare", "demo", "--methods", "moeits,mone", "--ratios",
        "0.5", "--data", f"english={english_text}", "--heldout", f"english={english_text}",
        "--sequences", "4", "--length", "64", "--windows", "2", "--window", "32", "--workers", "1",
        "--out", str(out), "--json",
    ]  # fmt: skip
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(out.glob("plans/moeits*.json")) and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout)
    _, whole = compared
    for name, row in by_name(result).items():
        assert row["status"] == "done"
        for key in ("perplexity", "kl", "agreement", "bytes"):
            assert row[key] == by_name(whole)[name][key]
    assert {path.name for path in out.iterdir()} == {
        "compare.json", "compare.html", "pareto.svg", "plans", "statistics",
    }  # fmt: skip


# --- methods of others, and seeds


class Broken(Method):
    """Raises what no method should."""

    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "breaks"
    source: ClassVar[str] = "test"
    budgets: ClassVar[tuple[str, ...]] = ("ratio",)

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        raise KeyError("gate")


class Dice(Method):
    """Keeps experts by the seed."""

    name: ClassVar[str] = "dice"
    summary: ClassVar[str] = "keeps any"
    source: ClassVar[str] = "test"
    budgets: ClassVar[tuple[str, ...]] = ("ratio",)

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        E = view.shape.experts
        keep = tuple(sorted((e + context.seed) % E for e in range(E // 2)))
        return LayerPlan(view.shape.layer, E, keep)


def test_a_broken_method_is_a_row(
    texts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeprune.core.method import _REGISTRY, methods

    methods()
    monkeypatch.setitem(_REGISTRY.classes, "broken", Broken)
    monkeypatch.setitem(_REGISTRY.classes, "dice", Dice)
    grid = Grid("broken,dice,moeits", (Budget(ratio=0.5),), seeds=(0, 1, 2))
    result = compare("demo", tmp_path / "run", grid, **texts)
    rows = result["cells"]
    assert [row["reason"] for row in rows.values() if row["name"] == "broken"] == (
        ["KeyError: 'gate'"] * 3
    )
    assert [row["status"] for row in rows.values() if row["name"] == "moeits"] == (
        ["done", "same", "same"]
    )
    dice = [row for row in rows.values() if row["name"] == "dice"]
    assert [row["seed"] for row in dice if row["status"] == "done"] == [0, 1, 2]
    assert len({row["perplexity"] for row in dice}) == 3
    assert "3 seeds" in (tmp_path / "run/compare.html").read_text(encoding="utf-8")


def test_texts_by_domains(
    texts: dict[str, Any], english_text: Path, french_text: Path, tmp_path: Path
) -> None:
    sources = (f"english={english_text}", f"french={french_text}")
    grid = Grid("mone,moeits", (Budget(ratio=0.5),), (0,), ("english", "english+french"), (2, 4))
    asked = texts | {"text": Text(sources, 4, 64), "heldout": Text(sources, 1, 32)}
    result = compare("demo", tmp_path / "run", grid, **asked)
    mone = [row["calibration"] for row in result["cells"].values() if row["name"] == "mone"]
    assert mone == ["english-2", "english-4", "english+french-2", "english+french-4"]
    # a method without data does not care, and is there once
    assert [row["name"] for row in result["cells"].values()].count("moeits") == 1
    # both domains together are the exact sum, and what calibrate gives on the same text
    folder = tmp_path / "run/statistics"
    walked = calibrate("demo", tmp_path / "s", Text(sources, 4, 64), compute=texts["compute"])
    merged = merge_statistics(
        [folder / "parts/english-2", folder / "parts/french-2"], tmp_path / "m"
    )
    for index in walked.layers:
        stored = StatisticsStore.open(folder / "english+french-4").layer(index)
        for name, tensor in merged.layer(index).to_tensors().items():
            assert tensor.equal(stored.to_tensors()[name])
        for name, tensor in walked.layer(index).to_tensors().items():
            near = 1e-4 * float(tensor.double().abs().max())  # other batches, other rounding
            assert stored.to_tensors()[name].double().allclose(tensor.double(), 1e-3, near), name
    assert "calibrated on" in (tmp_path / "run/compare.html").read_text(encoding="utf-8")


def test_estimates_have_no_more_digits_than_they_deserve() -> None:
    assert [spoken(s) for s in (41.7, 95, 605, 7300)] == ["42 s", "2 min", "10 min", "2 h 02 min"]


def test_the_page_has_an_atlas_and_can_be_drawn_again(compared: Compared, tmp_path: Path) -> None:
    out, result = compared
    page = (out / "compare.html").read_bytes()
    assert b'id="atlas-grid"' in page and b"Content-Security-Policy" in page
    assert result["atlas"]["domains"] == ["english"]
    assert report(out, tmp_path / "again.html").missing == ()
    assert (tmp_path / "again.html").read_bytes() == page
    half = {**result, "cells": dict(list(result["cells"].items())[:2])}
    (tmp_path / "half").mkdir()
    (tmp_path / "half/compare.json").write_text(json.dumps(half))
    [missing] = report(tmp_path / "half").missing
    assert missing.startswith(f"{len(result['order']) - 2} of {len(result['order'])} cells")
    (tmp_path / "half/compare.json").write_text(json.dumps({**half, "original": None}))
    with pytest.raises(MoepruneError, match="measured nothing yet"):
        report(tmp_path / "half", tmp_path / "none.html")


def test_layers_of_the_original_may_hold_different_numbers(
    texts: dict[str, Any], tmp_path: Path
) -> None:
    """The last layer has most; the page and one of the plans alone count all of them."""
    kept = {layer: 12 + layer for layer in range(6)}
    made = plan("demo", "random", Budget(ratio=0.5))
    layers = {i: LayerPlan(i, 32, tuple(range(kept[i]))) for i in kept}
    apply("demo", replace(made, layers=layers), tmp_path / "uneven")
    grid = Grid("random", (Budget(ratio=0.25),))
    result = compare(tmp_path / "uneven", tmp_path / "run", grid, **texts)
    [row] = result["cells"].values()
    assert row["experts_before"] == sum(kept.values()) and result["model"]["experts"] == 17
    assert 'id="atlas-grid"' in (tmp_path / "run/compare.html").read_text(encoding="utf-8")
    found, _ = gather(tmp_path / "run/plans")
    assert found["model"]["experts"] == 17
    assert {row["experts_before"] for row in found["rows"]} == {sum(kept.values())}
    assert report(tmp_path / "run/plans", tmp_path / "plans.html").path.is_file()
