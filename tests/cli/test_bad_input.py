"""Whatever a user gets wrong: one or two lines, exit code 2, and not a file more or less."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig

import moeprune.pipeline.demo
from moeprune.core.budget import Budget
from moeprune.models import kept_statistics
from moeprune.models.checkpoint import INDEX, demo_path
from moeprune.pipeline.demo import Cell
from moeprune.pipeline.inputs import Text
from running import Run
from support import tree

Refused = Callable[..., None]


def is_refusal(code: object, out: str, err: str, says: tuple[str, ...]) -> None:
    """The shape of every answer to bad input."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert 1 <= len(lines) <= 2, err
    assert lines[0].startswith("error: ")
    for words in says:
        assert words in err


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Refused:
    """Check that a command is refused with these words and changes nothing."""

    def check(*args: object, says: str | tuple[str, ...]) -> None:
        before = tree(tmp_path)
        done = run(*args)
        is_refusal(done.code, done.out, done.err, (says,) if isinstance(says, str) else says)
        assert tree(tmp_path) == before

    return check


@pytest.fixture
def copied(tmp_path: Path, tiny: Path) -> Path:
    """A model that may be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


# --- the model


@pytest.mark.parametrize("command", ["inspect", "calibrate", "plan", "apply", "prune", "evaluate"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "has no config.json"),
        (lambda path: path.write_text("{}"), "is a file"),
    ],
    ids=["missing", "empty", "file"],
)
def test_not_a_model(
    refused: Refused,
    tmp_path: Path,
    novices: Path,
    command: str,
    make: Callable[[Path], Any],
    says: str,
) -> None:
    make(tmp_path / "model")
    more = {
        "calibrate": ["--out", "out"],
        "plan": ["--method", "moeits", "--ratio", "0.5", "--out", "plan.json"],
        "apply": ["--plan", novices, "--out", "out"],
        "prune": ["--method", "moeits", "--ratio", "0.5", "--out", "out"],
    }.get(command, [])
    refused(command, tmp_path / "model", *more, says=("not a model directory", says))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"x")


DAMAGE: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "config not JSON": (
        lambda model: (model / "config.json").write_text('{"model_type": '),
        ("config.json is not valid JSON",),
    ),
    "config a list": (
        lambda model: (model / "config.json").write_text("[]"),
        ("config.json is not a JSON object",),
    ),
    "config of nothing": (
        lambda model: (model / "config.json").write_text("{}"),
        ("cannot read the configuration",),
    ),
    "truncated shard": (
        lambda model: cut(sorted(model.glob("*.safetensors"))[1]),
        ("damaged file", "truncated", "again"),
    ),
    "missing shard": (
        lambda model: sorted(model.glob("*.safetensors"))[1].unlink(),
        ("missing shard", "again"),
    ),
    "index not JSON": (
        lambda model: (model / INDEX).write_text("no"),
        (f"{INDEX} is not valid JSON",),
    ),
    "only pytorch_model.bin": (only_pickle, ("no safetensors weights", "pytorch_model.bin")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_model(refused: Refused, copied: Path, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(copied)
    refused("inspect", copied, says=says)
    refused("prune", copied, "--method", "moeits", "--ratio", "0.5", "--out", "out", says=says)


def test_dense_model(refused: Refused, tmp_path: Path, novices: Path) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    says = ("is a dense model (llama)", "no experts")
    refused("inspect", "dense", says=says)
    refused("calibrate", "dense", "--out", "out", says=says)
    refused("plan", "dense", "--method", "moeits", "--keep", "4", "--out", "p.json", says=says)
    refused("apply", "dense", "--plan", novices, "--out", "out", says=says)


# --- budgets, methods, options

BUDGETS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "below 0": ("moeits", ["--ratio", "-0.1"], ("out of range: -0.1", "below 1")),
    "all": ("moeits", ["--ratio", "1.0"], ("out of range: 1",)),
    "more than all": ("mone", ["--ratio", "1.5"], ("out of range: 1.5",)),
    "nan": ("mone", ["--ratio", "nan"], ("out of range: nan",)),
    "not a number": ("mone", ["--ratio", "half"], ("--ratio", "number", "plan --help")),
    "fewer than top-k": ("moeits", ["--ratio", "0.95"], ("leaves 2 of 32", "--keep 4")),
    "keep fewer than top-k": ("moeits", ["--keep", "3"], ("leaves 3 of 32", "--keep 4")),
    "keep too many": ("moeits", ["--keep", "33"], ("--keep 33", "has 32 experts")),
    "keep negative": ("moeits", ["--keep", "-1"], ("--keep must not be negative",)),
    "two": (
        "moeits",
        ["--ratio", "0.5", "--keep", "16"],
        ("exactly one budget", "--ratio and --keep"),
    ),
    "none": ("moeits", [], ("exactly one budget", "got none")),
    "not of MoNE": ("mone", ["--tau", "1.0"], ("mone has no --tau", "--ratio, --keep")),
    "not of MoEITS": ("moeits", ["--pattern", "2:4"], ("moeits has no --pattern",)),
    "not of MoE-Pruner": ("moe-pruner", ["--keep", "16"], ("moe-pruner has no --keep",)),
    "pattern of more": ("moe-pruner", ["--pattern", "4:2"], ("bad pattern 4:2", "2:4")),
    "pattern of letters": ("moe-pruner", ["--pattern", "x"], ("bad pattern 'x'", "2:4")),
    "pattern that does not divide": (
        "moe-pruner",
        ["--pattern", "2:5"],
        ("pattern 2:5 does not fit rows of 192 and 96",),
    ),
    "method": ("moeit", ["--ratio", "0.5"], ("unknown method 'moeit'", "did you mean 'moeits'?")),
    "option": (
        "moeits",
        ["--ratio", "0.5", "-o", "flor=3"],
        ("no option 'flor'", "did you mean 'floor'?"),
    ),
    "option's value": (
        "moeits",
        ["--ratio", "0.5", "-o", "floor=many"],
        ("moeits, option floor", "integer"),
    ),
    "option's choice": (
        "mone",
        ["--ratio", "0.5", "-o", "scope=world"],
        ("mone, option scope", "'layer', 'global' or 'importance'"),
    ),
    "option without value": (
        "moeits",
        ["--ratio", "0.5", "-o", "floor"],
        ("bad option 'floor'", "name=value"),
    ),
    "seed": ("moeits", ["--ratio", "0.5", "--seed", "-1"], ("--seed", "plan --help")),
    "unknown flag": ("moeits", ["--ration", "0.5"], ("No such option: --ration", "--help")),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_bad_budget_or_option(refused: Refused, small: tuple[str, ...], name: str) -> None:
    method, args, says = BUDGETS[name]
    refused("plan", "demo", "--method", method, "--out", "p.json", *args, *small, says=says)


@pytest.mark.parametrize("name", ["below 0", "keep too many", "two", "option's value", "method"])
def test_prune_refuses_the_same(refused: Refused, small: tuple[str, ...], name: str) -> None:
    method, args, says = BUDGETS[name]
    refused("prune", "demo", "--method", method, "--out", "out", *args, *small, says=says)


def test_pattern_that_does_not_divide_with_statistics(refused: Refused, stats: Path) -> None:
    args = ["--statistics", stats, "-o", "propagate=dense", "--pattern", "2:5"]
    says = ("pattern 2:5 does not fit", "choose an M that divides both")
    refused("plan", "demo", "--method", "moe-pruner", "--out", "p.json", *args, says=says)


def test_usage(refused: Refused) -> None:
    refused("inspect", says=("Missing argument", "moeprune inspect --help"))
    refused("calibrate", "demo", says=("Missing option '--out'", "moeprune calibrate --help"))
    refused("shrink", "demo", says=("No such command 'shrink'", "moeprune --help"))


# --- text


TEXTS: dict[str, tuple[str, bytes | None, tuple[str, ...]]] = {
    "missing": ("none.jsonl", None, ("no such text file", "none.jsonl")),
    "empty": ("empty.txt", b"", ("empty.txt is empty",)),
    "empty lines": ("empty.jsonl", b"\n\n", ("empty.jsonl is empty",)),
    "short": ("short.txt", b"only a few words", ("shorter than one sequence", "--length")),
    "not JSON": ("x.jsonl", b'{"text": "a"}\nplain\n', ("x.jsonl, line 2", "'text'")),
    "no text field": ("x.jsonl", b'{"content": "a"}\n', ("line 1", "'text'")),
    "text not a string": ("x.jsonl", b'{"text": null}\n', ("line 1", "'text'")),
    "half a character": ("x.jsonl", b'{"text": "\\ud800"}\n', ("line 1", "'text'")),
    "not UTF-8": ("x.txt", "déjà vu".encode("latin-1"), ("x.txt is not UTF-8 text",)),
    "JSONL not UTF-8": ("x.jsonl", b'{"text": "d\xe9j\xe0"}\n', ("x.jsonl is not UTF-8 text",)),
    "not gzip": ("x.jsonl.gz", b'{"text": "a"}\n', ("x.jsonl.gz is damaged or not gzip",)),
    "truncated gzip": (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 99)[:-12],
        ("x.jsonl.gz is damaged or not gzip",),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_bad_text(refused: Refused, tmp_path: Path, command: str, name: str) -> None:
    file, content, says = TEXTS[name]
    if content is not None:
        (tmp_path / file).write_bytes(content)
    more = ["--out", "out"] if command == "calibrate" else []
    refused(command, "demo", *more, "--data", f"english={file}", "--length", "64", says=says)


def test_two_texts_of_one_name(refused: Refused, english: Path) -> None:
    args = ["--data", english, "--data", english]
    refused("calibrate", "demo", "--out", "out", *args, says="two sources are called 'english'")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sequences", "0"], "--sequences must be at least 1 (got 0)"),
        (["--sequences", "-3"], "--sequences must be at least 1 (got -3)"),
        (["--length", "1"], "--length must be at least 2 (got 1)"),
        (["--length", "0"], "--length must be at least 2 (got 0)"),
        (["--dtype", "float8"], ("unknown dtype 'float8'", "bfloat16")),
        (["--device", "toaster"], ("device 'toaster' cannot be used", "--device cpu")),
        (["--device", "meta"], ("device 'meta' cannot be used", "--device cpu")),
        (["--workers", "-1"], "--workers"),
        (["--collect", "routng"], ("unknown accumulator 'routng'", "did you mean 'routing'?")),
        (["--collect", ""], "unknown accumulator ''"),
    ],
    ids=str,
)
def test_bad_settings(
    refused: Refused, small: tuple[str, ...], args: list[str], says: str | tuple[str, ...]
) -> None:
    refused("calibrate", "demo", "--out", "out", *small, *args, says=says)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sequences", "-1"], "--sequences must be at least 0 (got -1)"),
        (["--length", "1"], "--length must be at least 2 (got 1)"),
        (["--dtype", "half"], "unknown dtype 'half'"),
    ],
    ids=str,
)
def test_bad_settings_of_evaluate(
    refused: Refused, small: tuple[str, ...], args: list[str], says: str
) -> None:
    refused("evaluate", "demo", *small, *args, says=says)


def test_no_tokenizer(refused: Refused, tiny: Path, small: tuple[str, ...]) -> None:
    says = ("no usable tokenizer", "copy tokenizer.json")
    refused("calibrate", tiny, "--out", "out", *small, says=says)
    refused("evaluate", tiny, *small, says=says)


def test_tokenizer_of_a_larger_model(
    refused: Refused, copied: Path, small: tuple[str, ...]
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_path() / name, copied)
    refused("calibrate", copied, "--out", "out", *small, says=("the tokenizer", "knows 128"))


def test_teacher_with_another_vocabulary(
    refused: Refused, tiny: Path, small: tuple[str, ...]
) -> None:
    says = ("teacher and student have different vocabularies", "128", "6144")
    refused("evaluate", "demo", "--teacher", tiny, *small, says=says)


# --- outputs


def outputs(stats: Path, novices: Path, small: tuple[str, ...]) -> dict[str, list[object]]:
    """Commands that write a directory, without their --out."""
    return {
        "calibrate": ["calibrate", "demo", *small],
        "merge": ["merge", stats, stats],
        "apply": ["apply", "demo", "--plan", novices],
        "prune": ["prune", "demo", "--method", "mone", "--ratio", "0.5", "--statistics", stats],
        "demo": ["demo"],
    }


DIRECTORIES = ["calibrate", "merge", "apply", "prune", "demo"]


@pytest.mark.parametrize("command", DIRECTORIES)
def test_directory_exists(
    refused: Refused,
    tmp_path: Path,
    stats: Path,
    novices: Path,
    small: tuple[str, ...],
    command: str,
) -> None:
    args = outputs(stats, novices, small)[command]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    refused(*args, "--out", "mine", says=("output exists: mine", "--force"))
    refused(*args, "--out", "file", says=("output exists: file", "--force"))
    refused(*args, "--out", "mine", "--force", says=("--force would delete mine", "another --out"))
    refused(*args, "--out", "file", "--force", says=("file is a file", "another --out"))
    refused(*args, "--out", "file/out", says=("cannot write file/out", "is a file"))


def test_plan_exists(refused: Refused, tmp_path: Path, novices: Path, stats: Path) -> None:
    args = ["plan", "demo", "--method", "mone", "--ratio", "0.5", "--statistics", stats]
    (tmp_path / "plan.json").write_text("{}")
    refused(*args, "--out", "plan.json", says=("output exists: plan.json", "--force"))
    (tmp_path / "folder").mkdir()
    refused(*args, "--out", "folder", says="output exists: folder")
    refused(*args, "--out", "folder", "--force", says="folder is a directory")
    refused(*args, "--out", "p.safetensors", says=("a plan is JSON", "p.json"))
    shutil.copy(novices.with_suffix(".safetensors"), tmp_path / "old.safetensors")
    refused(*args, "--out", "old.json", says=("output exists: old.safetensors", "--force"))


def test_plan_does_not_replace_the_weights_of_a_model(
    refused: Refused, tmp_path: Path, stats: Path
) -> None:
    shutil.copytree(demo_path(), tmp_path / "model")
    args = ["--method", "mone", "--ratio", "0.5", "--statistics", stats, "--force"]
    says = ("--force would replace model/model.safetensors", "another --out")
    refused("plan", "model", *args, "--out", "model/model.json", says=says)


@pytest.mark.parametrize("command", ["apply", "prune"])
def test_output_does_not_replace_the_model_that_is_read(
    refused: Refused, tmp_path: Path, novices: Path, small: tuple[str, ...], command: str
) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "demo.json").write_text("{}")  # it looks like an output of ours
    shutil.copytree(demo_path(), tmp_path / "all" / "model")
    (tmp_path / "all" / "model" / "moeprune.json").write_text("{}")
    how = {
        "apply": ["--plan", novices],
        "prune": ["--method", "moeits", "--ratio", "0.5", *small],
    }[command]
    for out in ("all/model", "all"):
        refused(command, "all/model", *how, "--out", out, "--force", says="is the model itself")


def test_no_permission(
    refused: Refused, tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: path != tmp_path and real(path, *a))
    refused("calibrate", "demo", "--out", "out", *small, says="no permission to write in")


def test_permission_that_is_refused_late(
    refused: Refused, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("mkdtemp", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    args = ["calibrate", "demo", "--out", "new/parent/out", *small]
    refused(*args, says=("cannot write new/parent/out", "Permission denied"))


def full(*args: object, **more: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", DIRECTORIES)
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_disk_full(
    refused: Refused,
    tmp_path: Path,
    stats: Path,
    novices: Path,
    small: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    replacing: bool,
) -> None:
    if command == "demo":
        text = Text((small[1],), 2, 64)
        cells = (Cell("half", "mone", Budget(ratio=0.5)),)
        short = partial(moeprune.pipeline.demo.demo, cells=cells, text=text)
        monkeypatch.setattr(moeprune.pipeline.demo, "demo", short)
    args = outputs(stats, novices, small)[command]
    monkeypatch.setattr(os, "fsync", full)
    says = ("disk full while writing", "free some space")
    if replacing:
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "moeprune.json").write_text("{}")
        refused(*args, "--out", "old", "--force", says=says)
    else:
        refused(*args, "--out", "new/parent/out", says=says)


def test_disk_full_inside_safetensors(
    run: Run, tmp_path: Path, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer that was whole stays, and nothing else."""
    saved: list[object] = []
    real = kept_statistics.save_file

    def second_fails(tensors: object, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half of it")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(kept_statistics, "save_file", second_fails)
    done = run("calibrate", "demo", "--out", "out", *small)
    is_refusal(done.code, done.out, done.err, ("disk full while writing out", "is kept in"))
    assert len(saved) == 2 and not (tmp_path / "out").exists()
    kept = tmp_path / "out.calibration" / "output"
    assert [file.name for file in kept.iterdir()] == ["layer-00000.safetensors"]


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("call", [1, 2])
def test_disk_full_at_either_file_of_a_plan(
    refused: Refused,
    tmp_path: Path,
    stats: Path,
    novices: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    replacing: bool,
) -> None:
    calls: list[int] = []
    real = os.fsync

    def fails(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            full()
        real(handle)

    if replacing:
        for suffix in (".json", ".safetensors"):
            shutil.copy(novices.with_suffix(suffix), tmp_path / f"plan{suffix}")
    monkeypatch.setattr(os, "fsync", fails)
    args = ["plan", "demo", "--method", "mone", "--ratio", "0.25", "--statistics", stats]
    out = "plan.json" if replacing else "new/plan.json"
    refused(*args, "--out", out, *["--force"] * replacing, says="disk full while writing")
    assert len(calls) == call


# --- plans


@pytest.fixture
def own_plan(tmp_path: Path, novices: Path) -> Path:
    """A plan that may be edited."""
    for suffix in (".json", ".safetensors"):
        shutil.copy(novices.with_suffix(suffix), tmp_path)
    return tmp_path / novices.name


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_plan_for_another_model(refused: Refused, novices: Path, smaller: Path, tiny: Path) -> None:
    for model in (smaller, tiny):
        args = ["apply", model, "--plan", novices, "--out", "out"]
        refused(*args, says=("made for another model (demo", "plan again for this model"))


def test_plan_not_there_or_not_JSON(refused: Refused, tmp_path: Path, stats: Path) -> None:
    args = ["apply", "demo", "--out", "out", "--plan"]
    refused(*args, "plan.json", says=("no plan at plan.json", "moeprune plan"))
    (tmp_path / "plan.json").write_text('{"format": ')
    refused(*args, "plan.json", says="plan.json is not valid JSON")
    (tmp_path / "plan.json").write_text("[1, 2]")
    refused(*args, "plan.json", says=("not a plan", "moeprune plan"))
    refused(*args, stats, says="no plan at")
    refused(*args, "plan.json/x", says="plan.json/x")


def test_plan_without_its_vectors(refused: Refused, own_plan: Path) -> None:
    args = ["apply", "demo", "--plan", own_plan, "--out", "out"]
    vectors = own_plan.with_suffix(".safetensors")
    content = vectors.read_bytes()
    vectors.write_bytes(content[:-1])
    refused(*args, says="is not the file that novices.json was written with")
    vectors.unlink()
    refused(*args, says=("needs its vectors, 'novices.safetensors'", "copy both"))


WRONG_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "expert twice": (
        lambda data: data["layers"]["1"]["keep"].append(data["layers"]["1"]["replaced"][0]),
        ("layer 1",),
    ),
    "expert outside": (
        lambda data: data["layers"]["2"]["keep"].append(32),
        ("layer 2", "outside 0..31"),
    ),
    "expert without vector": (
        lambda data: data["layers"]["0"].update(keep=[], replaced=list(range(32))),
        ("layers.0", "has no vector"),
    ),
    "id as text": (lambda data: data["layers"]["0"].update(keep=["0"]), ("layers.0", "'keep'")),
    "too few": (
        lambda data: data["layers"]["3"].update(keep=[0, 1], replaced=[]),
        ("layer 3", "2 experts remain"),
    ),
    "deleted and replaced": (
        lambda data: data["layers"]["4"]["keep"].pop(),
        ("layer 4", "cannot be mixed"),
    ),
    "layer that is not there": (
        lambda data: data["layers"].update({"6": data["layers"]["5"]}),
        ("layers.6",),
    ),
    "no layers": (lambda data: data.pop("layers"), ("'layers' is missing",)),
    "format": (lambda data: data.update(format="moeprune.plan/9"), ("not a plan", "moeprune plan")),
    "vectors elsewhere": (
        lambda data: data["vectors"].update(file="../novices.safetensors"),
        ("needs its vectors",),
    ),
}


@pytest.mark.parametrize("name", WRONG_EDITS)
def test_plan_edited_wrongly(refused: Refused, own_plan: Path, name: str) -> None:
    change, says = WRONG_EDITS[name]
    edit(own_plan, change)
    refused("apply", "demo", "--plan", own_plan, "--out", "out", says=says)


def test_padding_where_it_is_not_exact(refused: Refused, own_plan: Path) -> None:
    edit(own_plan, lambda data: [layer.update(replaced=[]) for layer in data["layers"].values()])
    edit(own_plan, lambda data: data["layers"]["0"].update(keep=list(range(20))))
    says = ("between 16 and 20 experts per layer", "--keep 16")
    refused("apply", "demo", "--plan", own_plan, "--pad", "--out", "out", says=says)


def test_multiples_that_do_not_fit(refused: Refused) -> None:
    command = ("plan", "demo", "--method", "moeits", "--out", "p.json")
    refused(*command, "--keep", 13, "--multiple-of", 4, says="use --keep 16")
    refused(*command, "--ratio", 0.5, "--multiple-of", 40, says="none of its numbers")
    refused(*command, "--ratio", 0.5, "--multiple-of", 0, says="--multiple-of")
    pruner = ("plan", "demo", "--method", "moe-pruner", "--out", "p.json", "--ratio", 0.5)
    refused(*pruner, "--multiple-of", 4, says="moe-pruner removes no experts")


def test_plan_edited_well_is_carried_out(run: Run, own_plan: Path, tmp_path: Path) -> None:
    """Taking an expert from ``replaced`` and back into ``keep`` keeps its weights."""
    layer = json.loads(own_plan.read_text())["layers"]["2"]
    saved = layer["replaced"][3]
    edit(
        own_plan,
        lambda data: data["layers"]["2"].update(
            keep=sorted([*layer["keep"], saved]),
            replaced=[e for e in layer["replaced"] if e != saved],
        ),
    )
    done = run("apply", "demo", "--plan", own_plan, "--out", "out", "--json")
    assert done.code == 0
    assert json.loads(done.out)["experts"] == [192, 97]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved not in config["approximate_experts"]["2"]
    assert len(config["approximate_experts"]["2"]) == 15


# --- statistics


@pytest.fixture
def own_stats(tmp_path: Path, stats: Path) -> Path:
    """Statistics that may be damaged."""
    return Path(shutil.copytree(stats, tmp_path / "stats"))


MONE = ["--method", "mone", "--ratio", "0.5", "--out", "p.json"]


def test_no_statistics(refused: Refused, tmp_path: Path) -> None:
    refused("plan", "demo", *MONE, says=("there are no statistics", "moeprune calibrate"))
    args = ["plan", "demo", *MONE, "--statistics", "stats"]
    refused(*args, says=("no statistics in stats", "moeprune calibrate"))
    (tmp_path / "stats").mkdir()
    refused(*args, says="no statistics in stats")


def test_statistics_of_another_model(refused: Refused, smaller: Path, stats: Path) -> None:
    args = ["plan", smaller, *MONE, "--statistics", stats]
    refused(*args, says=("are of another model (demo, not smaller)", "calibrate this model"))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "format": (lambda data: data.update(format="x"), ("is not of format", "calibrate")),
    "no layers": (lambda data: data.pop("layers"), ("manifest.json is damaged", "layers")),
    "a layer less": (lambda data: data["layers"].pop("3"), ("manifest.json is damaged", "layers")),
    "no data": (lambda data: data.pop("data"), ("manifest.json is damaged", "data")),
    "no model": (lambda data: data["model"].pop("fingerprint"), ("damaged", "model.fingerprint")),
    "shape": (lambda data: data["layers"]["0"]["shape"].pop("top_k"), ("damaged", "top_k")),
    "tokens": (lambda data: data["layers"]["0"].update(tokens="many"), ("damaged", "tokens")),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_damaged_manifest(refused: Refused, own_stats: Path, stats: Path, name: str) -> None:
    change, says = MANIFESTS[name]
    edit(own_stats / "manifest.json", change)
    refused("plan", "demo", *MONE, "--statistics", own_stats, says=says)
    refused("merge", stats, own_stats, "--out", "sum", says=says)


def test_damaged_statistics(refused: Refused, own_stats: Path, stats: Path) -> None:
    args = ["plan", "demo", *MONE, "--statistics", own_stats]
    file = own_stats / "layer-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused(*args, says=("statistics of layer 4", "damaged", "again"))
    refused("merge", stats, own_stats, "--out", "sum", says="statistics of layer 4")
    file.unlink()
    refused(*args, says=("statistics of layer 4", "damaged"))
    (own_stats / "manifest.json").write_text("{")
    refused(*args, says="manifest.json is not valid JSON")


def test_statistics_without_what_the_method_needs(
    run: Run, refused: Refused, small: tuple[str, ...], stats: Path
) -> None:
    assert run("calibrate", "demo", "--out", "few", "--collect", "routing", *small).code == 0
    says = ("do not hold 'outputs'", "--collect outputs,routing")
    refused("plan", "demo", *MONE, "--statistics", "few", says=says)
    says = ("differ in collect", "collected alike")
    refused("merge", "few", stats, "--out", "sum", says=says)


def test_statistics_for_a_method_that_walks(refused: Refused, stats: Path) -> None:
    args = ["--method", "moe-pruner", "--ratio", "0.5", "--statistics", stats]
    says = ("edits each layer before it observes the next", "-o propagate=dense")
    refused("plan", "demo", *args, "--out", "p.json", says=says)
    refused("prune", "demo", *args, "--out", "out", says=says)


# --- as a process of its own


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plan", "demo", "--bogus"], ("No such option: --bogus", "moeprune plan --help")),
        (
            ["calibrate", "demo", "--out", "out", "--length", "1"],
            ("--length must be at least 2",),
        ),
    ],
    ids=["usage", "calibrate"],
)
def test_as_a_process(tmp_path: Path, args: list[str], says: tuple[str, ...]) -> None:
    before = tree(tmp_path)
    command = [sys.executable, "-m", "moeprune", *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    is_refusal(done.returncode, done.stdout, done.stderr, says)
    assert tree(tmp_path) == before


# --- experts that stay or go, and sizes


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--keep", "4", "--pin", "3"], ("bad --pin '3'", "LAYER:IDS")),
        (["--keep", "4", "--pin", "9:1"], ("layer 9 is no MoE layer", "0, 2, 3")),
        (["--keep", "4", "--forbid", "2:8"], "layer 2 has experts 0..7"),
        (["--keep", "4", "--pin", "*:1", "--forbid", "2:1"], "both pinned and forbidden"),
        (["--keep", "2", "--pin", "2:0,1,2"], ("layer 2", "3 are pinned", "at least 3")),
        (["--keep", "7", "--forbid", "2:0,1"], ("2 are forbidden", "at most 6")),
        (["--keep", "4", "--protect-super"], ("there are none", "moeprune calibrate")),
        (["--keep", "4", "--target-bytes", "1GB"], "got --target-bytes and --keep"),
        (["--target-bytes", "1GB", "--target-params", "9"], "give exactly one budget"),
        (["--target-bytes", "much"], ("bad --target-bytes 'much'", "24GiB")),
        (["--target-params", "1GB"], ("bad --target-params '1GB'", "8e9")),
        (["--target-bytes", "0"], "--target-bytes must be positive"),
        (["--target-bytes", "1kB"], ("cannot be reached: the smallest", "at least")),
    ],
    ids=str,
)
def test_wishes_that_cannot_be_met(
    refused: Refused, tiny: Path, args: list[str], says: str | tuple[str, ...]
) -> None:
    refused("plan", tiny, "--method", "random", *args, "--out", "p.json", says=says)


def test_masks_make_no_file_smaller(refused: Refused, tiny: Path) -> None:
    args = ["plan", tiny, "--method", "moe-pruner", "--out", "p.json"]
    refused(*args, "--target-bytes", "1GB", says=("leaves every tensor its size", "zeros"))
    refused(*args, "--ratio", "0.5", "--pin", "0:1", says="--pin, --forbid and --protect-super")
