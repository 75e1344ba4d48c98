"""Both doors give the scores of plain lm_eval, bit for bit; so do results no stock class opens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moeprune
from moeprune import Budget, Compute, Text
from moeprune.errors import UnsupportedModelError
from moeprune.evaluation import blimp
from moeprune.evaluation.harness import doors, running
from moeprune.evaluation.harness.catalogue import Catalogue
from moeprune.evaluation.harness.local import Folder
from moeprune.evaluation.harness.running import Asked, Outcome
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.models.data import load_tokenizer
from moeprune.pipeline.sample import measure_sample
from running import page

TASKS = {
    "arc_easy": "test",
    "hellaswag": "validation",
    "winogrande": "validation",
    "boolq": "validation",
    "wikitext": "test",
}
FLOAT32 = Compute(dtype="float32", workers=1)
Plain = dict[str, Any]


def plain_lm_eval(folder: Path, work: Path, tasks: dict[str, str], shots: int | None) -> Plain:
    """What a user of lm_eval gets who writes task files for the same data."""
    import lm_eval.evaluator
    from lm_eval.tasks import TaskManager

    home = Catalogue(tasks).manager.task_index
    for name, split in tasks.items():
        splits = {"training": None, "validation": None, "test": None, "fewshot": None}
        files = {split: str(folder / f"{name}.jsonl")}
        if shots:
            files["train"], splits["training"] = str(folder / f"{name}_train.jsonl"), "train"
        config = {
            "include": str(home[name].yaml_path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")},
            **{f"{key}_split": split if key == split else value for key, value in splits.items()},
        }
        (work / f"{name}.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:  # asks pip and git about the machine, for seconds
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        found: Plain = lm_eval.evaluator.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(demo_path()), "dtype": "float32"},
            tasks=list(tasks),
            num_fewshot=shots,
            batch_size=8,
            device="cpu",
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False, include_path=str(work)),
        )
    return found


def through(door: str, source: Any, folder: Path, asked: list[Asked]) -> dict[str, Outcome]:
    catalogue = Catalogue([one.task for one in asked])
    ready, left_out = running.prepare(asked, catalogue, Folder(folder), door == "whole")
    assert not left_out
    checkpoint = Checkpoint.open(source)
    tokenizer = load_tokenizer(checkpoint)
    if door == "streamed":
        shared = doors.Shared({"it": FLOAT32.open(checkpoint)}, 8, 1)
        opened = partial(doors.streamed, shared, "it", tokenizer)
    else:
        model = moeprune.load(source, dtype=torch.float32)
        opened = partial(doors.whole, model, tokenizer, 8)
    found = running.measure(ready, {"it": opened})
    return {one.task: both["it"] for one, both in found.items()}


def same_as_plain(mine: Outcome, plain: Plain, name: str) -> None:
    theirs = plain["results"][name]
    assert mine.values
    for metric, value in mine.values.items():
        assert value == theirs[f"{metric},none"], metric
    samples = sorted(plain["samples"][name], key=lambda sample: sample["doc_id"])
    assert mine.questions == [(name, sample["doc_id"]) for sample in samples]
    for metric, items in mine.items.items():
        assert items == [float(sample[metric]) for sample in samples]
    rolling = name == "wikitext"
    want = [[r if rolling else r[0] for r in s["filtered_resps"]] for s in samples]
    assert mine.loglikelihoods == want


@pytest.fixture(scope="module")
def plain(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    return plain_lm_eval(questions, tmp_path_factory.mktemp("plain"), TASKS, None)


@pytest.mark.parametrize("door", doors.DOORS)
def test_scores_are_those_of_the_harness(door: str, questions: Path, plain: Plain) -> None:
    found = through(door, "demo", questions, [Asked(name) for name in TASKS])
    assert set(found) == set(TASKS)
    for name, mine in found.items():
        same_as_plain(mine, plain, name)


def test_few_shot_prompts_are_those_of_the_harness(questions: Path, tmp_path: Path) -> None:
    theirs = plain_lm_eval(questions, tmp_path, {"arc_easy": "test"}, 2)
    found = through("streamed", "demo", questions, [Asked("arc_easy", 2)])
    same_as_plain(found["arc_easy"], theirs, "arc_easy")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("results")
    text = Text((str(page(work, "english", 2_000)),), 2, 48)
    moeprune.calibrate("demo", work / "stats", text, compute=FLOAT32)
    made = {}
    for name, method, options in (
        ("novices", "mone", {}),
        ("uneven", "ean", {"scope": "global"}),
        ("merged", "m-smoe", {}),
    ):
        plan = moeprune.plan(
            "demo", method, Budget(ratio=0.5), work / "stats", options=options, compute=FLOAT32
        )
        if name == "uneven":
            assert len({len(layer.keep) for layer in plan.layers.values()}) > 1
        moeprune.apply("demo", plan, work / name)
        made[name] = work / name
    return made


@pytest.mark.parametrize("kind", ["novices", "uneven", "merged"])
def test_results_that_stock_classes_cannot_open(
    kind: str, results: dict[str, Path], questions: Path, plain: Plain
) -> None:
    asked = [Asked("arc_easy")]
    both = [through(door, results[kind], questions, asked)["arc_easy"] for door in doors.DOORS]
    assert both[0].loglikelihoods == both[1].loglikelihoods
    original = [[r[0] for r in s["filtered_resps"]] for s in plain["samples"]["arc_easy"]]
    assert both[0].loglikelihoods != original


def test_one_pass_serves_all_models(questions: Path, results: dict[str, Path]) -> None:
    checkpoints = {"a": Checkpoint.open("demo"), "b": Checkpoint.open(results["novices"])}
    models = {name: FLOAT32.open(checkpoint) for name, checkpoint in checkpoints.items()}
    steps: list[tuple[int, int]] = []
    shared = doors.Shared(models, 8, 1, lambda done, total: steps.append((done, total)))
    tokenizer = load_tokenizer(checkpoints["a"])
    ready, _ = running.prepare(
        [Asked("boolq")], Catalogue(["boolq"]), Folder(questions), generates=False
    )
    opened = {name: partial(doors.streamed, shared, name, tokenizer) for name in models}
    [both] = running.measure(ready, opened, limit=3).values()
    assert both["a"].questions == both["b"].questions == [("boolq", i) for i in range(3)]
    assert both["a"].loglikelihoods != both["b"].loglikelihoods
    layers = sum(len(model.layers) for model in models.values())
    assert steps == [(n + 1, layers) for n in range(layers)], "one batch, once through each model"


def test_streamed_door_generates_nothing(questions: Path) -> None:
    asked = Asked("gsm8k")
    ready, left_out = running.prepare([asked], Catalogue(["gsm8k"]), Folder(questions), False)
    assert not ready
    assert isinstance(left_out[asked], UnsupportedModelError)
    assert "--door whole" in left_out[asked].hint


def test_the_package_sample_is_measured_as_the_harness_does(tmp_path: Path) -> None:
    """Every pair as a question of the harness's own BLiMP task, through its own class."""
    import json

    pairs = blimp.read_sample(70)
    rows = "".join(json.dumps(row) + "\n" for row in pairs)
    (tmp_path / "blimp_adjunct_island.jsonl").write_text(rows)
    theirs = through("whole", "demo", tmp_path, [Asked("blimp_adjunct_island")])
    checkpoint = Checkpoint.open("demo")
    models = {"demo": FLOAT32.open(checkpoint)}
    mine = measure_sample(models, load_tokenizer(checkpoint), 70, FLOAT32, lambda *_: None, 8)
    assert mine["demo"] == [item == 1.0 for item in theirs["blimp_adjunct_island"].items["acc"]]
