"""The sections ``tasks`` and ``protocols``: refusals, pairing, tables that are never mixed."""

from __future__ import annotations

import collections
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeprune
from moeprune import Budget, Compute, MoepruneError, Text
from moeprune.cli.app import main
from moeprune.cli.task_tables import print_tasks, sample_rows
from moeprune.evaluation import blimp
from moeprune.evaluation.harness import catalogue
from moeprune.evaluation.harness.catalogue import Catalogue
from moeprune.evaluation.harness.local import Folder
from moeprune.evaluation.harness.protocols import PROTOCOLS, Protocol
from moeprune.evaluation.harness.scores import mean_score, score
from moeprune.evaluation.schema import check
from moeprune.evaluation.shares import Pairs
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline.inputs import silent
from moeprune.pipeline.prompts import Generate, read_prompts
from moeprune.pipeline.sample import with_sample
from moeprune.pipeline.tasks import TaskOptions, Tasks

FLOAT32 = Compute(dtype="float32", workers=1)


def refusal(*names: str, **more: Any) -> MoepruneError:
    with pytest.raises(MoepruneError) as caught:
        Tasks(TaskOptions(names, **more))
    return caught.value


def test_unknown_task_names_the_nearest() -> None:
    error = refusal("blimp_sample", "arc_eazy")
    assert error.problem == "unknown task 'arc_eazy'"
    assert "arc_easy" in error.hint


def test_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal("hellaswag", data=tmp_path)
    assert "'hellaswag'" in error.problem and "hellaswag.jsonl" in error.hint
    assert "Rowan/hellaswag" in error.hint
    assert "no such folder" in refusal("hellaswag", data=tmp_path / "none").problem


def test_without_data_and_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.api.task

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network here")

    monkeypatch.setattr(lm_eval.api.task.datasets, "load_dataset", offline)
    error = refusal("arc_easy")
    assert "no network here" in error.problem
    assert "--task-data" in error.hint and "arc_easy.jsonl" in error.hint


@pytest.mark.parametrize("text", ['{"quiz": "?"}\n', "not JSON\n", "[1]\n"])
def test_files_of_another_form(text: str, tmp_path: Path) -> None:
    (tmp_path / "arc_easy.jsonl").write_text(text)
    error = refusal("arc_easy", data=tmp_path)
    assert "arc_easy" in error.problem and error.hint
    assert len(str(error).splitlines()) <= 2


def test_options_that_make_no_sense() -> None:
    assert "shots are 15" in refusal("moeits", shots=3).problem
    assert "--door" in refusal("blimp_sample", door="back").problem
    assert "--limit" in refusal("blimp_sample", limit=0).problem


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(catalogue, "version", absent)
    assert "moeprune[eval]" in refusal("arc_easy").hint
    Tasks(TaskOptions(("blimp_sample",)))  # needs nothing that is not there


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("sys.argv", ["moeprune", "evaluate", "demo", *arguments])
        main()
    return int(caught.value.code or 0)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--tasks", "blimp_sampel") == 2
    assert "did you mean blimp_sample" in capsys.readouterr().err
    few = ("--sequences", "1", "--length", "8", "--limit", "5")
    assert command(*few, "--tasks", "blimp_sample", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    check(result)
    assert result["tasks"]["blimp_sample"]["items"] == 5 and result["protocols"] == {}


def test_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are."""
    file = tmp_path / "x.jsonl"
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    assert Folder(tmp_path).rows(file) == rows
    prompts = [{"prompt": row["text"]} for row in rows]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in prompts))
    assert len(read_prompts(Checkpoint.open("demo"), Text(), Generate(prompts=file))) == 2


def test_a_group_file_serves_its_tasks(questions: Path) -> None:
    leaves = {leaf.name: leaf for leaf in Catalogue(["mmlu"]).leaves("mmlu")}
    assert len(leaves) == 57
    changes = Folder(questions).overrides(leaves["mmlu_astronomy"], "mmlu")
    found = changes["custom_dataset"]()["test"]
    assert [row["subject"] for row in found] == ["astronomy"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "small"
    plan = moeprune.plan("demo", "random", Budget(ratio=0.75), seed=1, compute=FLOAT32)
    moeprune.apply("demo", plan, out)
    return out


Sections = dict[str, Any]


@pytest.fixture(scope="module")
def measured(questions: Path, pruned: Path) -> Sections:
    both = {"arc_easy": "acc_norm", "boolq": "acc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "small", Protocol("small", "here", 1, both, "ours"))
        names = ("arc_easy", "moe-pruner", "mone", "small", "wikitext", "blimp_sample")
        tasks = Tasks(TaskOptions(names, 4, questions))
        found = {"tasks": tasks.tasks(pruned, "demo", FLOAT32, silent)}
        found["protocols"] = tasks.protocols()
    return json.loads(json.dumps(found, allow_nan=False))


def test_protocols_stay_apart(measured: Sections) -> None:
    tasks, protocols = measured["tasks"], measured["protocols"]
    assert tasks["moe-pruner/arc_easy"]["metric"] == "acc"
    assert tasks["mone/arc_easy"]["metric"] == "acc_norm"
    assert (tasks["mone/arc_easy"]["shots"], tasks["small/arc_easy"]["shots"]) == (0, 1)
    for name, protocol in protocols.items():
        assert all(key.startswith(f"{name}/") for key in protocol["tasks"])
    assert set(protocols["mone"]["left_out"]) == {
        "arc_challenge",
        "copa",
        "mmlu",
        "openbookqa",
        "piqa",
        "rte",
    }
    assert protocols["mone"]["mean"] is None and protocols["moe-pruner"]["mean"] is None


def test_a_mean_when_all_ran(measured: Sections) -> None:
    tasks, own = measured["tasks"], measured["protocols"]["small"]
    assert own["left_out"] == {}
    parts = [tasks["small/arc_easy"], tasks["small/boolq"]]
    for key in ("value", "teacher"):
        assert own["mean"][key] == pytest.approx(sum(part[key] for part in parts) / 2)
    gap = own["mean"]["difference"]
    assert gap["value"] == pytest.approx(own["mean"]["value"] - own["mean"]["teacher"])
    assert gap["low"] <= gap["value"] <= gap["high"]
    note = "few-shot examples are drawn from the measured questions"
    assert not tasks["small/arc_easy"]["notes"], "they have a file of their own"
    assert note in tasks["small/boolq"]["notes"][0]


def test_entries(measured: Sections) -> None:
    entry = measured["tasks"]["arc_easy"]
    assert (entry["protocol"], entry["items"], entry["metric"]) == (None, 4, "acc")
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert entry["difference"]["value"] == pytest.approx(entry["value"] - entry["teacher"])
    assert entry["verdict"].startswith("too small a sample")
    assert entry["harness"] and entry["task_version"] == "1.0"
    whole = measured["tasks"]["wikitext"]
    assert whole["value"] > whole["teacher"] and whole["difference"] is None
    assert measured["tasks"]["blimp_sample"]["items"] == 4


def test_two_protocols_two_tables(measured: Sections, capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(measured["tasks"], measured["protocols"])
    text = capsys.readouterr().out
    titles = [line for line in text.splitlines() if "-shot" in line and "arXiv" in line]
    assert len(titles) == 2
    assert "left out: copa" in text and "no mean of mone" in text
    assert text.count("\nmean") + text.count("\n mean") == 1


def test_pairing_question_by_question() -> None:
    teacher = [1.0] * 60 + [0.0] * 40
    student = [1.0] * 40 + [0.0] * 50 + [1.0] * 10  # lost 20, won 10
    found = score(student, teacher)
    assert (found["value"], found["teacher"]) == (0.5, 0.6)
    assert found["difference"]["value"] == pytest.approx(-0.1)
    assert found["p"] == Pairs(20, 10, 100).p_value()
    assert score([0.0] * 30 + student, [1.0] * 30 + teacher)["verdict"].startswith(
        "worse by 30.8 points ("
    )
    same = score(teacher, teacher)
    assert same["p"] == 1.0 and same["difference"]["low"] < 0 < same["difference"]["high"]
    with pytest.raises(ValueError, match="different questions"):
        score(student, teacher[:-1])
    mean = mean_score([student, teacher], [teacher, teacher])
    assert mean["value"] == pytest.approx(0.55)
    assert mean["difference"]["value"] == pytest.approx(-0.05)
    few = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    alike = mean_score(few, few)
    assert alike["difference"]["low"] < -0.1, "three questions without a difference prove nothing"
    assert 0.0 <= alike["low"] < 0.3 and 0.7 < alike["high"] <= 1.0


def test_the_mean_of_tasks_holds_the_truth() -> None:
    """Nine tasks of 24 questions, a quarter right: the shift of adjusted shares must not add up."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = mean_score((rng.random((9, 24)) < 0.25).astype(float).tolist(), None)
        held += found["low"] <= 0.25 <= found["high"]
    assert 0.92 <= held / 400 <= 0.985


def test_the_sample_is_balanced() -> None:
    rows = blimp.read_sample()
    by_paradigm = collections.Counter(row["UID"] for row in rows)
    assert len(by_paradigm) == 67 and set(by_paradigm.values()) == {10}
    assert len({row["UID"] for row in blimp.read_sample(67)}) == 67
    assert blimp.read_sample(70)[:67] == blimp.read_sample(67)
    folder = blimp.sample_path().parent
    assert blimp.sample_path().stat().st_size <= 60_000
    assert "Attribution 4.0" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert "Warstadt" in (folder / "README.md").read_text(encoding="utf-8")


def test_rows_of_a_demo_run(pruned: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "original", "path": None},
        {"name": pruned.name, "path": str(pruned)},
    ]
    with_sample(rows, pruned.parent, 134, FLOAT32, silent)
    first, second = (row["tasks"][blimp.NAME] for row in rows)
    assert first["teacher"] is None and first["value"] > blimp.CHANCE
    assert second["teacher"] == first["value"] and second["items"] == 134
    assert len(sample_rows(rows)) == 2
