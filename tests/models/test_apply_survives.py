"""A checkpoint whose writing was cut is finished by the same call, to the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import moeprune.models.writer as writer
from edit_kinds import offset, plan_of
from families import save_tiny
from moeprune.cli.app import main
from moeprune.core.plan import Plan
from moeprune.errors import CheckpointError, MoepruneError, OutputError
from moeprune.models import surgery
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import write_plan
from moeprune.pipeline import stages
from support import tree

Tell = Callable[[str, int, int], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return plan_of(model, offset)[1]  # with vectors


@pytest.fixture
def whole(model: Path, plan: Plan, tmp_path: Path, small_shards: None) -> dict[str, str]:
    """What an uninterrupted call makes."""
    stages.apply(model, plan, tmp_path / "whole")
    return tree(tmp_path / "whole")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(writer.write_shards, max_shard=100_000)
    monkeypatch.setattr(surgery, "write_shards", small)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are written, by their size."""
    found: list[str] = []
    real = writer.write_file

    def write(file: Path, *args: object) -> str:
        found.append(file.name.removeprefix(".").split(".safetensors")[0])
        return real(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_file", write)
    return found


def at(part: float, do: Callable[[], object]) -> Tell:
    """Do something once, when so much is written."""
    pending = [do]

    def tell(what: str, done: int, total: int) -> None:
        if done >= part * total and pending:
            pending.pop()()

    return tell


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", [0.4, 1.0])
def test_goes_on_behind_the_last_whole_shard(
    model: Path, plan: Plan, tmp_path: Path, whole: dict[str, str], written: list[str], part: float
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stages.apply(model, plan, out, progress=at(part, interrupt))
    assert not out.exists() and (tmp_path / "out.writing").is_dir()
    begun = len(written)
    first = set(written[:-1])  # the last one was cut
    sizes = stages.apply(model, plan, out)
    assert first and not first & set(written[begun:])
    assert tree(out) == whole and not (tmp_path / "out.writing").exists()
    assert sizes == surgery.sizes_of(stages_model(model), plan)
    with pytest.raises(OutputError, match="output exists"):
        stages.apply(model, plan, out)


def stages_model(model: Path) -> surgery.LayeredModel:
    return surgery.LayeredModel(Checkpoint.open(model))


def test_other_inputs_do_not_mix(
    model: Path, plan: Plan, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "out"
    layer = plan.layers[1]
    assert layer.offsets_CH is not None
    others = replace(layer, offsets_CH=2 * layer.offsets_CH)
    other = replace(plan, layers={**plan.layers, 1: others})
    with pytest.raises(KeyboardInterrupt):
        stages.apply(model, other, out, progress=at(0.5, interrupt))
    with pytest.raises(OutputError, match="begun with other inputs: vectors was"):
        stages.apply(model, plan, out)
    with pytest.raises(OutputError, match=r"writing was .*false.*, now .*true"):
        stages.apply(model, other, out, writing=stages.Writing(pad=True))
    stages.apply(model, plan, out, force=True)
    assert tree(out) == whole


def test_a_kept_shard_that_changed_is_written_again(
    model: Path, plan: Plan, tmp_path: Path, whole: dict[str, str], written: list[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stages.apply(model, plan, out, progress=at(0.9, interrupt))
    kept = sorted((tmp_path / "out.writing/output").glob("*.safetensors"))
    content = bytearray(kept[0].read_bytes())
    content[-7] ^= 1
    kept[0].write_bytes(content)
    os.truncate(kept[1], 1000)
    written.clear()
    stages.apply(model, plan, out)
    assert {kept[0].stem, kept[1].stem} < set(written)
    assert kept[2].stem not in written
    assert tree(out) == whole


def test_two_calls_exclude_each_other(
    model: Path, plan: Plan, tmp_path: Path, whole: dict[str, str]
) -> None:
    out, errors = tmp_path / "out", []

    def again() -> None:
        with pytest.raises(OutputError, match="another process works in") as caught:
            stages.apply(model, plan, out, force=True)
        errors.append(caught.value)

    stages.apply(model, plan, out, progress=at(0.5, again))
    assert errors and tree(out) == whole


def test_a_source_that_is_cut_or_cannot_be_read(
    plan: Plan, tmp_path: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_tiny("mixtral", tmp_path / "model"), tmp_path / "out"
    last = Checkpoint.open(model).shards[-1]
    content = last.read_bytes()
    with pytest.raises(CheckpointError, match=r"00\d.safetensors became shorter while it was read"):
        stages.apply(model, plan, out, progress=at(0.5, lambda: os.truncate(last, 9000)))
    last.write_bytes(content)
    real = Path.open

    def bad(path: Path, *args: object, **options: object) -> object:
        if path == last and options:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", bad)
    with pytest.raises(CheckpointError, match=r"cannot read .*safetensors: Input/output error"):
        stages.apply(model, plan, out)
    monkeypatch.undo()
    small = functools.partial(writer.write_shards, max_shard=100_000)
    monkeypatch.setattr(surgery, "write_shards", small)
    stages.apply(model, plan, out)
    assert tree(out) == whole


def test_full_disk_keeps_what_is_written(
    model: Path,
    plan: Plan,
    tmp_path: Path,
    whole: dict[str, str],
    written: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = tmp_path / "out", os.fsync

    def full(handle: int) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"disk full.*\n.*what is done is kept in .*out.writing"):
        stages.apply(model, plan, out)
    monkeypatch.setattr(os, "fsync", real)
    assert not [name for name in tree(tmp_path) if name.endswith(".partial")]
    stages.apply(model, plan, out)
    assert written.count(written[0]) == 1 and tree(out) == whole


def test_nothing_is_left_of_a_plan_that_cannot_be(model: Path, plan: Plan, tmp_path: Path) -> None:
    wrong = replace(plan, model={**plan.model, "fingerprint": "0" * 64})
    with pytest.raises(MoepruneError):
        stages.apply(model, wrong, tmp_path / "deep" / "out")
    assert not tree(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_command_and_keep_what_is_done(
    model: Path,
    plan: Plan,
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    write_plan(plan, tmp_path / "plan.json")
    small = surgery.write_shards

    def killing(place: object, pieces: object, progress: Callable[[int, int], None]) -> object:
        kill = at(0.5, lambda: os.kill(os.getpid(), number))
        return small(place, pieces, progress=lambda done, total: kill("", done, total))

    monkeypatch.setattr(surgery, "write_shards", killing)
    command = ["moeprune", "apply", str(model), "--plan", str(tmp_path / "plan.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
    before = signal.getsignal(signal.SIGTERM)
    # a shell that starts a job in the background lets it ignore Ctrl-C
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    assert stopped.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert "interrupted" in capfd.readouterr().err
    assert not [name for name in tree(tmp_path) if name.endswith(".partial")]
    monkeypatch.setattr(surgery, "write_shards", small)
    stages.apply(model, tmp_path / "plan.json", tmp_path / "out")
    assert {n: h for n, h in tree(tmp_path / "out").items() if n in whole}.keys() == whole.keys()
