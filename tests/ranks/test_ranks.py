"""Two, three and four gloo processes: the bytes of one, and errors that end all of them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from moeprune import Budget, Compute, Text, calibrate, evaluate, plan, write_plan
from moeprune.core.method import make_method
from moeprune.errors import MoepruneError
from moeprune.models import data
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


def fails_in_one() -> str:
    """What the others hear when the last one fails."""
    try:
        with joined() as ranks:
            if ranks.rank == ranks.size - 1:
                raise MoepruneError("no such disk", "buy one")
            ranks.barrier()
    except MoepruneError as error:
        return f"{error.problem} | {error.hint}"
    return "nothing"


def too_many(page: Path) -> str:
    """One batch cannot be shared."""
    try:
        with joined() as ranks:
            short = Text((str(page),), 1, 32)
            calibrate("demo", "never", short, compute=Compute(ranks=ranks))
    except MoepruneError as error:
        return error.problem
    return "nothing"


def process(rank: int, size: int, port: int, folder: Path, page: Path, methods: Any) -> None:
    """One of the processes."""
    data.TOKENS_PER_BATCH = BATCH
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    with joined() as ranks:
        said = [torch.get_num_threads(), ranks.gather(ranks.rank), ranks.broadcast(rank)]
        work(folder / "out", page, ranks, methods)
    said += [fails_in_one(), too_many(page)]
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


def launch(
    size: int, folder: Path, page: Path, methods: dict[str, dict[str, str]]
) -> list[list[Any]]:
    """Run so many processes; what each saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what takes longest is imported once for all of them
    set_forkserver_preload([calibrate.__module__, evaluate.__module__, plan.__module__])
    start_processes(process, (size, port, folder, page, methods), size, start_method="forkserver")
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
