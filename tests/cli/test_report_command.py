"""``moeprune report``: of a whole run, of pieces, of nothing; and what ``prune`` writes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget
from moeprune.core.method import make_method
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import facts
from moeprune.pipeline.inputs import Compute, Text
from moeprune.pipeline.reporting import UNROUTED, Witness, _originals_name
from moeprune.report import intervals, wording
from running import Done, Run


def data_of(page: Path) -> dict[str, Any]:
    """What the atlas of a page knows."""
    text = page.read_text(encoding="utf-8").partition('id="atlas-data">')[2]
    found: dict[str, Any] = json.loads(text.partition("</script>")[0])
    return found


def refused(done: Done, says: str) -> None:
    assert done.code == 2 and done.out == "" and re.search(says, done.err)
    assert done.err.startswith("error: ") and len(done.err.splitlines()) <= 2


def test_prune_writes_a_report_and_names_it(
    run: Run, tmp_path: Path, stats: Path, small: tuple[str, ...]
) -> None:
    args = ("prune", "demo", "--method", "mone", "--ratio", "0.5", "--out", "less", *small)
    done = run(*args)
    assert done.code == 0 and done.out.splitlines()[-1] == "report: less/report.html"
    page = tmp_path / "less" / "report.html"
    first = page.read_bytes()
    assert b"moeprune prune demo --method mone" in first and b"was not measured" in first

    routed = json.loads((tmp_path / "less/moeprune_run.json").read_bytes())["atlas"]["routing"]
    before, after = routed["rows"]["original"], routed["rows"]["less"]
    assert b"Effective experts" in first and set(before) == set(after) and routed["tokens"] >= 64
    assert all(1 <= part <= of == 32 for part, of in before.values())
    assert all(1 <= part <= of == 16 for part, of in after.values())  # novices are not counted

    known = data_of(page)
    store = StatisticsStore.open(stats)  # of the same text
    assert known["domains"] == ["english"] and known["layers"] == store.layers
    for place, shares in enumerate(facts.usage(store).values()):
        assert known["usage"][place] == pytest.approx(shares, rel=1e-3, abs=1e-9)
        assert known["served"][place] == [[count] for count in known["count"][place]]
    tokens = [entry for line in known["typical"] for expert in line for entry in expert]
    assert tokens and all(count >= 3 and lift > 1 for _, count, lift in tokens)
    assert known["rows"][0]["fates"][0].count("n") == 16

    again = run("report", "less", "--out", "copy.html", "--json")
    assert json.loads(again.out) == {"path": "copy.html", "missing": []}
    assert (tmp_path / "copy.html").read_bytes() == first
    refused(run("report", "less"), "output exists")
    assert page.read_bytes() == first
    assert run("report", "less", "--force").code == 0

    # an evaluation that was made since
    text = ("--sequences", "2", "--length", "64")
    done = run("evaluate", "less", "--teacher", "demo", *text, "--json")
    (tmp_path / "less/evaluation.json").write_text(done.out)
    measured = json.loads(done.out)
    assert run("report", "less", "--force").code == 0
    drawn = page.read_text(encoding="utf-8")
    german, every = measured["domains"]["german"], measured["groups"]["all"]
    assert wording.significant(german["perplexity"]) in drawn and "was not measured" not in drawn
    assert wording.times(math.exp(german["against"]["loss"]["value"])) in drawn
    assert intervals.bounds(every["against"]["kl"]) in drawn
    assert wording.significant(every["kl"]) in drawn and every["against"]["verdict"] in drawn
    alone = json.loads(run("evaluate", "demo", *text, "--json").out)["domains"]
    derived = facts.measured_original("demo", [measured])["perplexity"]
    assert derived == pytest.approx({d: score["perplexity"] for d, score in alone.items()})
    other = {**measured, "data": {**measured["data"], "hash": "of another text"}}
    assert facts.measured_original("demo", [measured, other]) == {}
    assert facts.measured_original("olmoe", [measured]) == {"perplexity": {}}
    (tmp_path / "less/evaluation.json").unlink()

    (tmp_path / "less/moeprune_run.json").unlink()
    done = run("report", "less", "--force")
    assert done.code == 0 and done.out == "report: less/report.html\n"
    assert "warning: no statistics" in done.err and "warning: no evaluation of less" in done.err
    known = data_of(page)
    assert known["rows"][0]["fates"][0].count("n") == 16 and known["served"][0] == []


def test_a_result_called_original_is_not_taken_for_it() -> None:
    assert _originals_name(Path("runs/less")) == "original"
    assert _originals_name(Path("runs/original")) not in {"original", "less"}


def test_what_a_witness_did_not_see_is_said(tmp_path: Path) -> None:
    unasked = Witness("demo", Compute(), "moeprune prune")
    assert unasked._routing(tmp_path) == (
        {},
        [f"{UNROUTED}the same command with --routing measures it"],
    )
    gone = Witness("demo", Compute(), "moeprune prune", Text(("no.jsonl",)))
    (told,) = gone._routing(Path("demo"))[1]
    assert told.startswith(UNROUTED) and "no.jsonl" in told
    assert "evaluate 'a b' --teacher demo --json > 'a b/evaluation.json'" in (
        unasked._what_to_run(Path("a b"))
    )


def test_the_report_of_pieces_says_what_is_missing(
    run: Run, tmp_path: Path, stats: Path, novices: Path
) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    shutil.copytree(stats, folder / "statistics")
    for file in (novices, novices.with_suffix(".safetensors")):
        shutil.copy(file, folder / file.name)
    against = {"loss": {"value": 0.5, "low": 0.25, "high": 0.75}}
    score = {"perplexity": 12.5, "loss": 2.525, "kl": 0.125, "agreement": 0.5, "against": against}
    evaluation = {"format": "moeprune.evaluation/1", "model": "novices", "teacher": "demo"}
    evaluation |= {"domains": {"english": score}, "groups": {"all": score}}
    (folder / "scores.json").write_text(json.dumps(evaluation))
    done = run("report", "half")
    assert done.code == 0 and done.out == "report: half/report.html\n"
    assert done.err.splitlines() == [
        "warning: no checkpoint of novices: sizes are unknown (moeprune apply)"
    ]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "12.5" in text and "0.125" in text and "no checkpoint of novices" in text
    assert "+0.50 [0.25,\N{NO-BREAK SPACE}0.75]" in text
    known = data_of(folder / "report.html")
    assert known["domains"] == ["english"] and known["rows"][0]["name"] == "novices"
    assert any(text.startswith("␣") for text in known["tokens"])  # spelt by the model's tokenizer

    (folder / "novices.safetensors").unlink()
    done = run("report", "half", "--force")
    assert done.code == 0 and "novices.json needs its vectors" in " ".join(done.err.split())
    (folder / "statistics/layer-00000.safetensors").write_bytes(b"")
    refused(run("report", "half", "--force"), "half is no run: .*needs its vectors")


def test_a_folder_that_is_no_run_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("report", "empty"), "is no run.*\n.*demo, prune, compare or run")
    refused(run("report", "nowhere"), "no such folder")
    (tmp_path / "cut.pruning").mkdir()
    (tmp_path / "cut.pruning/run.json").write_text("{}")
    refused(run("report", "cut"), r"cut is not finished: cut\.pruning holds.*\n.*again")
    (tmp_path / "empty/demo.json").write_text('{"format": "moeprune.run/1"}')
    refused(run("report", "empty"), "'command' is missing")
    (tmp_path / "empty/demo.json").write_text("{")
    refused(run("report", "empty"), "is damaged")
    refused(run("report", "empty", "--open", "maybe"), "yes or no")
    strange = {"format": "moeprune.compare/1", "original": {}, "cells": []}
    (tmp_path / "empty/compare.json").write_text(json.dumps(strange))
    refused(run("report", "empty"), "compare.json is damaged")
    (tmp_path / "empty/compare.json").unlink()
    assert [file.name for file in (tmp_path / "empty").iterdir()] == ["demo.json"]


def test_merged_and_masked_experts_are_told_apart(stats: Path) -> None:
    from moeprune.pipeline.stages import plan

    cases = (
        (make_method("m-smoe", {}), Budget(ratio=0.5), "merged"),
        (make_method("moe-pruner", {"propagate": "dense"}), Budget(pattern=(2, 4)), "masked"),
    )
    for method, budget, key in cases:
        layer = facts.plan_facts(plan("demo", method, budget, stats))["0"]
        assert len({*layer["keep"], *layer["dropped"], *map(int, layer.get("merged", {}))}) == 32
        if key == "masked":
            assert layer["masked"] and len(layer["keep"]) == 32 and "merged" not in layer
        else:
            assert len(layer["keep"]) <= 16 and layer["merged"]
            assert {e for into in layer["merged"].values() for e in into} <= {*layer["keep"]}
