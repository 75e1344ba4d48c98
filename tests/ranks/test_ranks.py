"""Two, three and four gloo processes: the bytes of one, and errors that end all of them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

from moeprune import Budget, Compute, Text, calibrate, evaluate, plan, write_plan
from moeprune.core.method import make_method
from moeprune.errors import MoepruneError
from moeprune.models import data, walk_state
from moeprune.models.joining import _connect
from moeprune.models.ranks import Ranks, joined
from running import page

BATCH = 128
"""Tokens per batch: eleven batches of little text, so that sums of sums are added."""
COLLECT = ("routing", "outputs", "router", "sample", "residual", "hidden-gram")
METHODS: dict[str, dict[str, str]] = {
    "reap": {},
    "mone": {"scope": "global"},
    "moeits": {"bins": "8"},
    "moe-pruner": {"propagate": "pruned"},
}
WORLDS = 4
"""That a process is in at most, one after another."""
Alone = Callable[[dict[str, dict[str, str]]], dict[str, str]]
FEW = {"reap": METHODS["reap"], "mone": METHODS["mone"]}


def work(folder: Path, page: Path, ranks: Ranks, methods: dict[str, dict[str, str]]) -> None:
    """Everything that processes share, into ``folder``."""
    text = Text((str(page),), 22, 64)
    compute = Compute(dtype="float32", workers=1, ranks=ranks)
    folder.mkdir(exist_ok=True)
    calibrate("demo", folder / "stats", text, COLLECT, compute)
    for name, options in methods.items():
        method = make_method(name, options)
        stats = None if method.sequential or not method.needs else folder / "stats"
        made = plan("demo", method, Budget(ratio=0.5), stats, text, compute=compute)
        if ranks.first:
            write_plan(made, folder / f"{name}.json")
    found = evaluate("demo", text=replace(text, sequences=4), compute=compute)
    if ranks.first:
        (folder / "evaluation.json").write_text(json.dumps({**found, "seconds": None}))


def fails_in_one(port: int) -> str:
    """What the others hear when the last one fails."""
    meet_at(port)
    try:
        with joined() as ranks:
            if ranks.rank == ranks.size - 1:
                raise MoepruneError("no such disk", "buy one")
            ranks.barrier()
    except MoepruneError as error:
        return f"{error.problem} | {error.hint}"
    return "nothing"


def too_many(page: Path, port: int) -> str:
    """One batch cannot be shared."""
    meet_at(port)
    try:
        with joined() as ranks:
            short = Text((str(page),), 1, 32)
            calibrate("demo", "never", short, compute=Compute(ranks=ranks))
    except MoepruneError as error:
        return error.problem
    return "nothing"


def process(
    rank: int, size: int, ports: Sequence[int], folder: Path, page: Path, methods: Any
) -> None:
    """One of the processes."""
    data.TOKENS_PER_BATCH = BATCH
    enter(rank, size)
    meet_at(ports[0])
    os.chdir(folder)
    with joined() as ranks:
        said = [torch.get_num_threads(), ranks.gather(ranks.rank), ranks.broadcast(rank)]
        work(folder / "out", page, ranks, methods)
    said += [fails_in_one(ports[1]), too_many(page, ports[2])]
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def planned(
    out: Path, page: Path, ranks: Ranks, name: str, options: dict[str, str], *told: Any
) -> None:
    """A plan, in ``out``."""
    progress, note = told or (lambda *step: None, print)
    plan(
        "demo", make_method(name, options), Budget(ratio=0.5), None, Text((str(page),), 22, 64),
        compute=Compute(dtype="float32", workers=1, ranks=ranks),
        progress=progress, out=out / f"{name}.json", note=note,
    )  # fmt: skip


def planning(
    rank: int, size: int, ports: Sequence[int], folder: Path, page: Path, methods: Any
) -> None:
    """Plans of one of the processes; the first time the last one is interrupted in each."""
    data.TOKENS_PER_BATCH = BATCH
    walk_state._SHARE = 1e9  # everything is kept at once
    enter(rank, size)
    again = (folder / "stopped").exists()
    said: dict[str, list[str]] = {name: [] for name in methods}

    def stop(what: str, done: int, total: int) -> None:
        if not again and rank == size - 1 and what in ("planning", "walking") and 2 * done > total:
            raise KeyboardInterrupt

    for port, (name, options) in zip(ports, methods.items(), strict=False):
        meet_at(port)
        with suppress(KeyboardInterrupt), joined() as ranks:
            try:
                planned(folder / "out", page, ranks, name, options, stop, said[name].append)
            except MoepruneError as error:
                said[name].append(error.problem)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def enter(rank: int, size: int) -> None:
    """What a launcher says to a process, but for the place to meet."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in told.items()}


def meet_at(port: int) -> None:
    """Of the next world; a second one at the same port could find what is left of the first."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def launch(
    size: int,
    folder: Path,
    page: Path,
    methods: dict[str, dict[str, str]],
    one: Callable[..., None] = process,
) -> list[Any]:
    """Run so many processes; what each saw."""
    with ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(WORLDS)]
        for one_of_them in free:
            one_of_them.bind(("127.0.0.1", 0))
        ports = [one_of_them.getsockname()[1] for one_of_them in free]
    # what takes longest is imported once for all of them
    set_forkserver_preload([calibrate.__module__, evaluate.__module__, plan.__module__])
    start_processes(one, (size, ports, folder, page, methods), size, start_method="forkserver")
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(size)]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("ranks-text"), "english", 8_000)


@pytest.fixture
def alone(english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """What one process makes."""
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", BATCH)

    def make(methods: dict[str, dict[str, str]]) -> dict[str, str]:
        work(tmp_path / "alone", english, Ranks(), methods)
        return digests(tmp_path / "alone")

    return make


def check(size: int, folder: Path, page: Path, wanted: dict[str, str], methods: Any) -> None:
    folder.mkdir()
    said = launch(size, folder, page, methods)
    made = digests(folder / "out")
    assert made == wanted
    assert {"stats/manifest.json", "stats/residual.safetensors", "evaluation.json"} < set(made)
    assert {f"{name}.json" for name in methods} < set(made)
    for rank, (threads, gathered, first, failure, refusal) in enumerate(said):
        assert threads >= 1
        assert gathered == list(range(size))
        assert first == 0
        others = "" if rank == size - 1 else f"process {size - 1}: "
        assert failure == f"{others}no such disk | buy one"
        assert refusal == f"{size} processes cannot share 1 batches of {BATCH} tokens"
    left = {file.name for file in folder.iterdir()}
    assert left == {"out", *(f"said-{rank}.json" for rank in range(size))}
    assert not [file.name for file in (folder / "out").iterdir() if "calibration" in file.name]


def test_two_processes_make_the_bytes_of_one(alone: Alone, english: Path, tmp_path: Path) -> None:
    check(2, tmp_path / "two", english, alone(FEW), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_more_processes_and_methods_make_the_bytes_of_one(
    size: int, alone: Alone, english: Path, tmp_path: Path
) -> None:
    check(size, tmp_path / "more", english, alone(METHODS), METHODS)


@pytest.mark.slow
def test_plans_of_two_processes_go_on(
    english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is interrupted; what each had decided and walked is not done again."""
    monkeypatch.setattr(data, "TOKENS_PER_BATCH", BATCH)
    methods = {name: METHODS.get(name, {}) for name in ("moeits", "moe-pruner", "sparsegpt")}
    for name, options in methods.items():
        planned(tmp_path / "one", english, Ranks(), name, options)
    folder = tmp_path / "two"
    folder.mkdir()
    for said in launch(2, folder, english, methods, planning):
        for name in methods:
            assert [text for text in said[name] if "what is done is kept in" in text], said
    kept = {file.name for file in (folder / "out").iterdir()}
    assert kept >= {f"{name}.json.{end}" for name in methods for end in ("plan", "rank-00001.plan")}
    (folder / "stopped").touch()
    for said in launch(2, folder, english, methods, planning):
        assert "layers were planned before" in said["moeits"][0]
        for name in ("moe-pruner", "sparsegpt"):
            assert "going on after" in said[name][0]
    assert digests(folder / "out") == digests(tmp_path / "one")


def test_who_does_not_appear_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher has a place to meet, and one of its processes never comes there."""
    place = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {"ADDR": "127.0.0.1", "PORT": str(place.port)}
    for name, value in told.items():
        monkeypatch.setenv(f"MASTER_{name}", value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(MoepruneError, match=r"1 of 2 processes did not appear within .*: 1\n"):
        _connect(Ranks(0, 2, 0, 2), "gloo", timedelta(seconds=0.3))
    assert not distributed.is_initialized()
