"""Every command does its job on the embedded model, and prints JSON and nothing else if asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import token_ids
from moeprune import __version__
from moeprune.core.accumulators import LIGHT
from moeprune.core.statistics import LayerStatistics
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.models.store import StatisticsStore, read_plan
from running import Done, Run
from support import tensor_digests, tree

COMMANDS = (
    "inspect", "calibrate", "merge", "plan", "apply", "prune", "evaluate", "recover", "verify",
    "methods", "demo", "report",
)  # fmt: skip


def as_json(done: Done) -> Any:
    """What a command printed: all of stdout is one JSON value."""
    assert done.code == 0, done.err
    return json.loads(done.out)


def same(a: LayerStatistics, b: LayerStatistics) -> None:
    """Equal bit for bit."""
    assert (a.shape, a.tokens) == (b.shape, b.tokens)
    mine, other = a.to_tensors(), b.to_tensors()
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


# --- inspect and methods


def test_inspect(run: Run) -> None:
    facts = as_json(run("inspect", "demo", "--json"))
    checkpoint = Checkpoint.open("demo")
    assert facts["name"] == "demo"
    assert facts["model_type"] == "olmoe"
    assert facts["moe_layers"] == list(range(6)) and facts["layers"] == 6
    assert (facts["experts"], facts["top_k"], facts["groups"]) == (32, 4, 1)
    assert facts["fingerprint"] == checkpoint.fingerprint
    assert facts["supported"] is True and facts["reason"] is None
    assert facts["parameters"] == checkpoint.numel and facts["bytes"] == checkpoint.nbytes
    # 6 layers of 32 experts of three matrices of 192 x 96; 28 of 32 are idle
    assert facts["expert_parameters"] == 6 * 32 * 3 * 192 * 96
    assert facts["active_parameters"] == checkpoint.numel - 6 * 28 * 3 * 192 * 96


@pytest.mark.parametrize("given", ["config.json", "."])
def test_inspect_of_a_configuration_alone(run: Run, given: str, tmp_path: Path) -> None:
    """Sizes follow from it; what only the tensors' names tell is left open."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "config.json").write_bytes((demo_path() / "config.json").read_bytes())
    facts = as_json(run("inspect", folder / given, "--json"))
    whole = as_json(run("inspect", "demo", "--json"))
    same = ("parameters", "active_parameters", "expert_parameters", "experts", "gates", "can")
    assert {key: facts[key] for key in same} == {key: whole[key] for key in same}
    assert facts["name"] == "alone"
    assert facts["bytes"] is None and facts["fingerprint"] is None


def test_inspect_of_pickles_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_bytes((demo_path() / "config.json").read_bytes())
    (tmp_path / "a/pytorch_model.bin").write_bytes(b"")
    done = run("inspect", tmp_path / "a")
    assert done.code == 2 and "pytorch_model.bin" in done.err


def test_inspect_of_uneven_layers(run: Run) -> None:
    assert run("prune", "demo", "--method", "moeits", "--tau", 2.5, "--out", "uneven").code == 0
    facts = as_json(run("inspect", "uneven", "--json"))
    assert len(set(facts["experts"])) > 1 and facts["supported"] is True
    assert facts["can"]["replace by constants"].startswith("no: its layers")


def test_models(run: Run) -> None:
    result = as_json(run("models", "--json"))
    assert result["transformers"] == result["installed"]
    assert result["architectures"]["mixtral"]["delete"] == "exact"
    done = run("models")
    assert done.err == "" and "qwen3_moe" in done.out and "refused" in done.out


def test_inspect_for_people(run: Run) -> None:
    done = run("inspect", "demo")
    assert done.code == 0 and done.err == ""
    assert "olmoe" in done.out and "12 722 880" in done.out


def test_inspect_tells_what_cannot_be_pruned(
    run: Run, novices: Path, tmp_path: Path, smaller: Path
) -> None:
    assert as_json(run("inspect", smaller, "--json"))["experts"] == 24
    assert run("apply", "demo", "--plan", novices, "--out", "half").code == 0
    facts = as_json(run("inspect", "half", "--json"))
    assert facts["supported"] is False and "constants already" in facts["reason"]


def test_methods(run: Run) -> None:
    listed = {entry["name"]: entry for entry in as_json(run("methods", "--json"))}
    assert {"mone", "moeits", "moe-pruner"} <= listed.keys()
    assert listed["mone"]["budgets"] == ["ratio", "keep"]
    assert listed["moeits"]["needs"] == []
    assert listed["moe-pruner"]["options"]["propagate"] == "pruned"
    assert all(entry["source"] and entry["summary"] for entry in listed.values())
    shown = run("methods")
    assert shown.code == 0 and all(name in shown.out for name in listed)


# --- calibrate and merge


def test_calibrate(run: Run, small: tuple[str, ...], tmp_path: Path, stats: Path) -> None:
    facts = as_json(run("calibrate", "demo", "--out", "stats", *small, "--json"))
    store = StatisticsStore.open(tmp_path / "stats")
    assert facts == {"path": "stats", **store.manifest}
    assert facts["format"] == "moeprune.statistics/1"
    assert facts["data"]["tokens"] == 6 * 64 and facts["data"]["domains"] == {"english": 6}
    assert facts["collect"] == sorted(LIGHT) and facts["dtype"] == "float32"
    assert facts["model"]["fingerprint"] == Checkpoint.open("demo").fingerprint
    assert store.layers == list(range(6))
    for index in store.layers:
        statistics = store.layer(index)
        assert statistics.tokens == 6 * 64
        # every token is routed to four experts
        assert int(statistics.to_tensors()["routing.count_E"].sum()) == 4 * 6 * 64
    # the same command, run again, writes the same bytes
    assert tree(tmp_path / "stats") == tree(stats)


def test_calibrate_on_the_embedded_text(run: Run, tiny: Path) -> None:
    args = ["calibrate", "demo", "--out", "s", "--sequences", "7", "--length", "16"]
    facts = as_json(run(*args, "--dtype", "float32", "--collect", "routing", "--json"))
    assert sum(facts["data"]["domains"].values()) == 7
    assert sorted(facts["data"]["domains"].values()) == [1, 1, 1, 1, 1, 2]
    assert facts["collect"] == ["routing"]


def test_the_seed_draws_other_text(run: Run, small: tuple[str, ...]) -> None:
    hashes = set()
    for seed in (0, 1):
        args = ["calibrate", "demo", "--out", f"s{seed}", *small, "--collect", "routing", "--json"]
        hashes.add(as_json(run(*args, "--seed", seed))["data"]["hash"])
    assert len(hashes) == 2


def test_length_is_clipped_to_what_the_model_was_built_for(run: Run, english: Path) -> None:
    args = ["calibrate", "demo", "--out", "s", "--data", english, "--sequences", "1"]
    facts = as_json(run(*args, "--length", "4096", "--collect", "routing", "--json"))
    assert facts["data"]["length"] == 512


def test_merge_equals_one_run(run: Run, english: Path, french: Path, tmp_path: Path) -> None:
    """64 sequences of 64 tokens are one batch, so that all runs compute the same batches."""
    common = ["--length", "64", "--dtype", "float32", "--collect", "routing,outputs,inputs"]
    data = {"en": ["--data", f"en={english}"], "fr": ["--data", f"fr={french}"]}
    for name, source in data.items():
        args = ["calibrate", "demo", "--out", name, *source, "--sequences", "64", *common]
        assert run(*args).code == 0
    both = [*data["en"], *data["fr"]]
    args = ["calibrate", "demo", "--out", "both", *both, "--sequences", "128", *common]
    assert run(*args).code == 0
    facts = as_json(run("merge", "en", "fr", "--out", "sum", "--json"))
    assert facts["data"]["tokens"] == 2 * 64 * 64
    assert facts["data"]["domains"] == {"en": 64, "fr": 64}
    stores = {name: StatisticsStore.open(tmp_path / name) for name in ("en", "fr", "both", "sum")}
    for index in range(6):
        same(stores["sum"].layer(index), stores["both"].layer(index))
        counts = {
            name: store.layer(index).to_tensors()["routing.count_E"]
            for name, store in stores.items()
        }
        assert torch.equal(counts["en"] + counts["fr"], counts["sum"])
        assert not torch.equal(counts["en"], counts["fr"])


def test_merge_with_itself_doubles(run: Run, stats: Path, tmp_path: Path) -> None:
    assert run("merge", stats, stats, "--out", "twice").code == 0
    once, twice = StatisticsStore.open(stats), StatisticsStore.open(tmp_path / "twice")
    for index in once.layers:
        assert twice.layer(index).tokens == 2 * once.layer(index).tokens
        name = "routing.count_E"
        assert torch.equal(
            twice.layer(index).to_tensors()[name], 2 * once.layer(index).to_tensors()[name]
        )


# --- plan, apply, prune


def test_plan(run: Run, stats: Path, tmp_path: Path) -> None:
    args = ["--ratio", "0.25", "--statistics", stats, "--seed", "5", "-o", "routing=count"]
    printed = as_json(run("plan", "demo", "--method", "mone", *args, "--out", "p.json", "--json"))
    written = json.loads((tmp_path / "p.json").read_text())
    vectors = written.pop("vectors")
    assert printed == {"path": "p.json", **written, "vectors": None}
    assert vectors["file"] == "p.safetensors" and len(vectors["sha256"]) == 64
    assert written["format"] == "moeprune.plan/1"
    assert written["method"] == "mone" and written["budget"] == {"ratio": 0.25}
    assert written["options"] == {
        "routing": "count",
        "scope": "layer",
        "normalise": True,
        "score": "fusion",
        "novice": "mean",
    }
    assert written["seed"] == 5
    assert written["model"]["fingerprint"] == Checkpoint.open("demo").fingerprint
    assert written["statistics"] == StatisticsStore.open(stats).summary
    assert set(written["versions"]) == {"moeprune", "torch", "transformers", "numpy"}
    tensors = load_file(tmp_path / "p.safetensors")
    assert written["layers"].keys() == {str(index) for index in range(6)}
    for index, layer in written["layers"].items():
        assert len(layer["keep"]) == 24 and len(layer["replaced"]) == 8
        assert sorted(layer["keep"] + layer["replaced"]) == list(range(32))
        [scores] = layer["scores"].values()
        assert len(scores) == 32
        assert max(scores[e] for e in layer["replaced"]) <= min(scores[e] for e in layer["keep"])
        assert tensors[f"layers.{index}.novices"].shape == (8, 192)


def test_plan_with_wishes(run: Run, stats: Path, tmp_path: Path) -> None:
    """Experts that stay and go, and a size instead of a ratio."""
    asked = ["--method", "reap", "--statistics", stats, "--protect-super"]
    asked += ["--pin", "0:1,2", "--pin", "*:0", "--forbid", "5:3", "--target-bytes", "16MB"]
    printed = as_json(run("plan", "demo", *asked, "--out", "p.json", "--json"))
    assert printed["budget"]["pinned"]["0"] == [0, 1, 2]
    assert printed["budget"]["forbidden"] == {"5": [3]}
    assert printed["budget"]["target_bytes"] == 16_000_000
    for index, layer in printed["layers"].items():
        assert {0} | ({1, 2} if index == "0" else set()) <= set(layer["keep"])
        protected = printed["budget"]["protected"].get(index, [])
        assert set(protected) <= set(layer["keep"])
        assert [f"experts {protected} are super experts: they stay"] * bool(protected) == (
            layer.get("notes", [])
        )
    assert 3 not in printed["layers"]["5"]["keep"]
    sizes = as_json(run("apply", "demo", "--plan", "p.json", "--out", "out", "--json"))
    assert sizes["bytes"][1] == printed["budget"]["bytes"] <= 16_000_000
    pruned = as_json(run("prune", "demo", *asked, "--out", "same", "--json"))
    assert pruned["bytes"] == sizes["bytes"]
    assert tensor_digests(tmp_path / "same") == tensor_digests(tmp_path / "out")
    people = run("plan", "demo", *asked, "--out", "q.json")
    assert people.code == 0 and "16000000" in people.out


def test_plan_for_people_and_its_warnings(run: Run) -> None:
    done = run("plan", "demo", "--method", "moeits", "--keep", "30", "--out", "p.json")
    assert done.code == 0
    assert "p.json" in done.out and "warning" not in done.out
    warnings = json.loads(Path("p.json").read_text())["warnings"]
    assert done.err.splitlines() == [f"warning: {text}" for text in warnings]


@pytest.mark.parametrize("budget", [["--ratio", "0.5"], ["--pattern", "2:4"]], ids=str)
def test_plan_that_walks(
    run: Run, small: tuple[str, ...], tmp_path: Path, budget: list[str]
) -> None:
    """moe-pruner needs no statistics, it observes each layer after the ones before are pruned."""
    args = ["--method", "moe-pruner", *budget, *small, "--out", "p.json"]
    printed = as_json(run("plan", "demo", *args, "--json"))
    assert printed["statistics"]["data"]["tokens"] == 6 * 64
    assert all(layer["keep"] == list(range(32)) for layer in printed["layers"].values())
    sizes = as_json(run("apply", "demo", "--plan", "p.json", "--out", "masked", "--json"))
    assert sizes["nonzero"] == [12_722_880, 12_722_880 - 6 * 32 * 3 * 192 * 96 // 2]
    found = Checkpoint.open(tmp_path / "masked")
    assert sum(int((found.read(name) == 0).sum()) for name in found.tensors) >= (
        sizes["nonzero"][0] - sizes["nonzero"][1]
    )


def test_plan_replaces_a_plan_with_force(run: Run, stats: Path, tmp_path: Path) -> None:
    args = ["plan", "demo", "--method", "mone", "--statistics", stats, "--out", "p.json"]
    assert run(*args, "--ratio", "0.5").code == 0
    assert run(*args, "--ratio", "0.25", "--force").code == 0
    assert all(len(p.replaced) == 8 for p in read_plan(tmp_path / "p.json").layers.values())
    assert sorted(file.name for file in tmp_path.glob("p*")) == ["p.json", "p.safetensors"]


def test_apply(run: Run, novices: Path, tmp_path: Path) -> None:
    sizes = as_json(run("apply", "demo", "--plan", novices, "--out", "half", "--json"))
    before, after = Checkpoint.open("demo"), Checkpoint.open(tmp_path / "half")
    assert sizes["path"] == "half" and sizes["experts"] == [192, 96]
    assert sizes["bytes"] == [before.nbytes, after.nbytes]
    assert sizes["parameters"] == [before.numel, after.numel] == sizes["nonzero"]
    made = json.loads((tmp_path / "half" / "moeprune.json").read_text())
    assert made["base_fingerprint"] == before.fingerprint
    assert made["method"] == "mone" and made["budget"] == {"ratio": 0.5}
    assert (tmp_path / "half" / "tokenizer.json").is_file()


def test_apply_replaces_an_output_with_force(run: Run, novices: Path, tmp_path: Path) -> None:
    args = ["apply", "demo", "--plan", novices, "--out", "half"]
    assert run(*args).code == 0
    first = tree(tmp_path)
    (tmp_path / "half" / "left.txt").write_text("of an older version")
    assert run(*args, "--force").code == 0
    assert tree(tmp_path) == first


def test_prune_is_calibrate_plan_and_apply(
    run: Run, small: tuple[str, ...], stats: Path, novices: Path, tmp_path: Path
) -> None:
    args = ["prune", "demo", "--method", "mone", "--ratio", "0.5", "--json", "--out"]
    done = as_json(run(*args, "at-once", *small))
    assert done["experts"] == [192, 96]
    assert done["seconds"].keys() == {"calibrate", "plan", "apply"}
    done = as_json(run(*args, "from-statistics", "--statistics", stats, "--dtype", "float32"))
    assert done["seconds"].keys() == {"plan", "apply"}
    assert run("apply", "demo", "--plan", novices, "--out", "step-by-step").code == 0
    weights = {
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("at-once", "from-statistics", "step-by-step")
    }
    assert len(weights) == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_prune_writes_what_stock_transformers_opens(run: Run, tmp_path: Path) -> None:
    args = ["prune", "demo", "--method", "moeits", "--keep", "8", "--out", "small", "--json"]
    assert as_json(run(*args))["experts"] == [192, 48]
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    assert model.config.num_experts == 8
    with torch.no_grad():
        assert torch.isfinite(model(token_ids(1, 8)).logits).all()


# --- evaluate


def test_evaluate(run: Run, small: tuple[str, ...], smaller: Path) -> None:
    result = as_json(run("evaluate", smaller, "--teacher", "demo", *small, "--json"))
    assert result["format"] == "moeprune.evaluation/1"
    assert (result["model"], result["teacher"]) == ("smaller", "demo")
    assert result["dtype"] == "float32"
    assert result["domains"].keys() == {"english"}
    score = result["domains"]["english"]
    assert score["tokens"] == 6 * 63
    assert score["perplexity"] > 1 and score["kl"] > 0 and 0 < score["agreement"] < 1
    total = result["groups"]["all"]
    assert total["kl"] == score["kl"] and total["perplexity"] == score["perplexity"]
    alone = as_json(run("evaluate", smaller, *small, "--json"))
    assert alone["teacher"] is None and alone["groups"]["all"]["kl"] is None
    assert alone["domains"]["english"]["perplexity"] == score["perplexity"]


def test_evaluate_for_people(run: Run, small: tuple[str, ...], smaller: Path) -> None:
    done = run("evaluate", smaller, "--teacher", "demo", *small)
    assert done.code == 0 and done.err == ""
    lines = done.out.splitlines()
    (english,) = (line for line in lines if line.startswith("english"))
    assert re.search(r"[+-]0\.\d{3} \([+-]0\.\d{3} to [+-]0\.\d{3}\)", english)
    words = ("worse by", "no difference", "too small a sample", "better by")
    for name in ("english", "= all"):
        (said,) = (line for line in lines if line.startswith(f"  {name}: "))
        assert said.removeprefix(f"  {name}: ").startswith(words)


# --- the command line itself


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0 and done.err == ""
    assert f"Example: moeprune {command}" in " ".join(done.out.split())


def test_help_names_every_command(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    listed = {line.split()[1] for line in done.out.splitlines() if len(line.split()) > 2}
    assert set(COMMANDS) <= listed


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.code, done.out, done.err) == (0, f"{__version__}\n", "")


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done.code == 2
    assert "Usage: moeprune" in done.out and done.err == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, moeprune.cli.app; "
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_plan_diff(run: Run, novices: Path, stats: Path) -> None:
    other = ["--method", "mone-ls", "--ratio", "0.25", "--statistics", stats]
    assert run("plan", "demo", *other, "--out", "other.json").code == 0
    found = as_json(run("plan-diff", novices, "other.json", "--json"))
    assert found["format"] == "moeprune.plan-diff/1"
    assert found["methods"] == ["mone", "mone-ls"]
    assert found["differs"]["budget"] == {"ratio": [0.5, 0.25]}
    assert found["all"]["both"] + found["all"]["only_first"] == 6 * 16
    assert set(found["layers"]) == {str(index) for index in range(6)}
    people = run("plan-diff", novices, novices)
    assert people.code == 0 and "1.00" in people.out and "Spearman" in people.out
    assert run("plan-diff", novices, novices.with_name("none.json")).code == 2


def test_recover_and_what_it_tells(run: Run, smaller: Path, english: Path, tmp_path: Path) -> None:
    sizes = ("--data", english, "--sequences", "20", "--length", "32")
    short = ("--steps", "2", "--batch", "2", "--learning-rate", "1e-4")
    common = ("--teacher", "demo", "--how", "router-kd", *sizes, *short)
    told = as_json(run("recover", smaller, *common, "--out", tmp_path / "healed", "--json"))
    assert told["steps"] == 2
    assert told["changed"]["frozen"][0] == 0
    assert run("verify", tmp_path / "healed").code == 0
    assert run("verify", tmp_path / "healed", "--against", "demo").code == 0
    done = run("recover", smaller, *common, "--out", tmp_path / "again")
    assert done.code == 0
    assert "routers" in done.out
    done = run("recover", smaller, *common, "--out", tmp_path / "again")
    assert (done.code, "exists" in done.err) == (2, True)
    done = run("recover", "demo", *common, "--out", tmp_path / "other")
    assert (done.code, "moeprune.json" in done.err) == (2, True)
