"""Text for recovery and calibration: datasets, conversations, weights, the teacher's samples."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moeprune import recover, training
from moeprune.cli.options import parse_mix
from moeprune.errors import DataError, MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import (
    Domain,
    draw,
    find_sources,
    load_tokenizer,
    parse_sources,
    read_documents,
    shares,
    tokenise,
)
from moeprune.models.documents import Dataset
from moeprune.pipeline.inputs import Text, read_calibration
from moeprune.pipeline.teacher_samples import Samples
from support import tensor_digests

ROWS = [{"text": f"Row {n} of a small set of words.", "other": f"Else {n}."} for n in range(40)]
CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Any:
    return load_tokenizer(Checkpoint.open(teacher))


def write_rows(file: Path, rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def folders(shelf: Path) -> dict[str, Path]:
    """A dataset as files, and as the library saves one, with splits and without."""
    datasets = pytest.importorskip("datasets")
    found = {name: shelf / "datasets" / name for name in ("files", "split", "whole")}
    write_rows(found["files"] / "train.jsonl", ROWS)
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(found["whole"]))
    datasets.DatasetDict({"train": made, "tail": made.select(range(30, 40))}).save_to_disk(
        str(found["split"])
    )
    return found


@pytest.mark.parametrize(
    ("name", "after", "wanted"),
    [
        ("files", "", [row["text"] for row in ROWS]),
        ("split", "::tail", [row["text"] for row in ROWS[30:]]),
        ("whole", "#other", [row["other"] for row in ROWS]),
    ],
)
def test_datasets_in_directories(
    folders: dict[str, Path], tokenizer: Any, name: str, after: str, wanted: list[str]
) -> None:
    source = f"dataset:{folders[name]}{after}"
    [(domain, dataset)] = find_sources((source,), "calibration").items()
    assert domain == name
    assert isinstance(dataset, Dataset)
    assert list(dataset.documents(tokenizer)) == wanted
    file = write_rows(folders[name].parent / f"{name}.jsonl", [{"text": one} for one in wanted])
    same = tokenise(tokenizer, "x", file, 16).ids_NL
    assert tokenise(tokenizer, "x", dataset, 16).ids_NL.equal(same)
    with pytest.raises(DataError, match="is not a file"):
        parse_sources((source,), "calibration")


def test_the_same_draw_whatever_holds_the_text(folders: dict[str, Path], teacher: Path) -> None:
    checkpoint = Checkpoint.open(teacher)
    file = write_rows(folders["files"].parent / "a.jsonl", ROWS)
    text = Text((f"a={file}",), 6, 16, seed=1)
    [wanted] = read_calibration(checkpoint, text)
    as_dataset = Text((f"a=dataset:{folders['whole']}",), 6, 16, seed=1)
    [found] = read_calibration(checkpoint, as_dataset)
    assert found.ids_NL.shape == (6, 16)
    pool = tokenise(load_tokenizer(checkpoint), "a", file, 16, most=4 * 6)
    assert found.ids_NL.equal(draw([pool], 6, 1)[0].ids_NL)
    assert found.ids_NL.shape == wanted.ids_NL.shape


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("dataset:", "not a dataset"),
        ("dataset:a:b:c:d", "not a dataset"),
        ("dataset:{whole}::validation", "no split 'validation'"),
        ("dataset:{split}::validation", "no split 'validation'"),
        ("dataset:{split}#nothing", "no 'nothing'"),
        ("dataset:{missing}", "cannot be read"),
    ],
)
def test_bad_datasets(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, source: str, problem: str
) -> None:
    places = {**folders, "missing": tmp_path / "missing"}
    with pytest.raises(DataError, match=problem) as caught:
        for dataset in find_sources((source.format(**places),), "calibration").values():
            assert isinstance(dataset, Dataset)
            list(dataset.documents(tokenizer))
    assert len(str(caught.value).splitlines()) <= 2


def test_without_the_library(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match="needs datasets") as caught:
        list(Dataset("a").documents(tokenizer))
    assert "moeprune[data]" in caught.value.hint


def test_conversations(tmp_path: Path, teacher: Path, folders: dict[str, Path]) -> None:
    shutil.copytree(teacher, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    chat = load_tokenizer(Checkpoint.open(tmp_path / "chat"))
    rows = [{"messages": CHAT}, {"text": "Plain."}] * 8
    file = write_rows(tmp_path / "chat.jsonl", rows)
    rendered = f"{chat.bos_token}<user> Two and two?\n<assistant> Four.\n"
    assert list(read_documents(file, chat)) == [rendered, "Plain."] * 8
    ids = tokenise(chat, "x", file, 8).ids_NL.flatten().tolist()
    assert ids[0] == chat.bos_token_id != ids[1]  # the template's own, once
    zipped = tmp_path / "chat.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert tokenise(chat, "x", zipped, 8).ids_NL.flatten().tolist() == ids
    plain = load_tokenizer(Checkpoint.open(teacher))
    with pytest.raises(DataError, match="line 1: a conversation, and the tokenizer has no"):
        list(read_documents(file, plain))
    for bad in ("Four.", [{"role": "user"}, 3]):
        with pytest.raises(DataError, match="line 1"):
            list(read_documents(write_rows(tmp_path / "bad.jsonl", [{"messages": bad}]), chat))


def test_weights_of_domains() -> None:
    names = ("a", "b", "c")
    assert shares(names, 10, {}) == [4, 3, 3]
    assert shares(names, 10, {"a": 2}) == [5, 3, 2]  # 5, 2.5, 2.5: the first of equals
    assert shares(names, 7, {"a": 0, "b": 0.1, "c": 0.2}) == [0, 2, 5]
    for mix, problem in (({"d": 1}, "no text is called 'd'"), (dict.fromkeys(names, 0), "of 0")):
        with pytest.raises(DataError, match=problem):
            shares(names, 10, mix)


def test_a_mix_is_drawn_as_without_it(teacher: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(teacher)
    both = tuple(str(write_rows(tmp_path / f"{name}.jsonl", ROWS)) for name in "ab")
    equal = read_calibration(checkpoint, Text(both, 8, 16))
    again = read_calibration(checkpoint, Text(both, 8, 16, mix=(("a", 1.0), ("b", 1.0))))
    assert [len(d.ids_NL) for d in equal] == [4, 4]
    assert all(x.ids_NL.equal(y.ids_NL) for x, y in zip(equal, again, strict=True))
    heavy = read_calibration(checkpoint, Text(both, 8, 16, mix=(("b", 3.0),)))
    assert [(d.name, len(d.ids_NL)) for d in heavy] == [("a", 2), ("b", 6)]
    assert isinstance(heavy[0], Domain)


@pytest.mark.parametrize("mix", ["a", "a=x", "a=-1", "a=1,a=2", "=2", "a=nan"])
def test_bad_mixes(mix: str) -> None:
    assert parse_mix("a=2, b=0.5") == (("a", 2.0), ("b", 0.5))
    with pytest.raises(MoepruneError, match="bad weight"):
        parse_mix(mix)


def test_what_the_teacher_writes(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    from moeprune.cli.app import app

    options = {"steps": 2, "batch": 2, "holdout": 0.1, "evaluate_every": 2}
    written = Text((*text.sources, "own=teacher-samples:0.7"), 12, 24)
    lines: list[str] = []

    def listen(status: Any) -> None:
        [file] = (tmp_path / "a.recovery").glob("samples-*.jsonl")
        lines[:] = file.read_text().splitlines()

    made = training("logit-kd", None, options)
    recover(students["dropped"], teacher, tmp_path / "a", made, written, listen=listen)
    assert len(lines) == 6
    assert len({json.loads(line)["text"] for line in lines}) == 6
    record = json.loads((tmp_path / "a" / "moeprune.json").read_text())["recovered"][0]
    assert set(record["data"]["domains"]) == {"english", "own"}
    assert not (tmp_path / "a.recovery").exists()
    arguments = ["recover", students["dropped"], "--teacher", teacher, "--out", tmp_path / "b"]
    arguments += ["--how", "logit-kd", "--steps", 2, "--batch", 2, "--holdout", 0.1]
    arguments += ["--evaluate-every", 2, "--sequences", 12, "--length", 24]
    for source in written.sources:
        arguments += ["--data", source]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    assert tensor_digests(tmp_path / "a") == tensor_digests(tmp_path / "b")


def test_bad_samples(students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path) -> None:
    assert Samples.parse("x=y.jsonl") is None
    with pytest.raises(DataError, match="bad temperature"):
        Samples.parse("teacher-samples:0")
    for master, sources, problem in (
        (None, ("teacher-samples",), "written by a teacher"),
        (teacher, ("teacher-samples", "a=teacher-samples"), "asked for twice"),
    ):
        with pytest.raises(DataError, match=problem):
            recover(students["dropped"], master, tmp_path / "x", "full", Text(sources, 4, 16))
    unknown = Text(("teacher-samples",), 4, 16, mix=(("english", 2.0),))
    with pytest.raises(DataError, match="no text is called 'english'"):
        recover(students["dropped"], teacher, tmp_path / "x", "full", unknown)
    with pytest.raises(DataError, match="for moeprune recover"):
        find_sources(("teacher-samples",), "calibration")
    assert not list(tmp_path.iterdir())
