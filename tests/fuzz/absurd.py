"""Opens checkpoints whose config.json holds one absurd number after the other.

python absurd.py VALUES DIRECTORY...

Runs in a process of its own, with a limit on its memory: prints, as JSON, what was slow or was
answered by anything but a result or a ``MoepruneError``, and by how much the process grew.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.pipeline.inspection import inspect

SECONDS = 10.0
GROWTH = 100
"""MiB that one case may add."""
MEMORY = 3 << 29
"""Bytes of address space that a case may use beyond what the process has."""


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all numbers in a configuration; of a list only its first."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from numbers(part, (*path, key))
    elif isinstance(value, list):
        for index, part in enumerate(value[:1]):
            yield from numbers(part, (*path, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def changed(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``config`` with ``value`` at ``path``."""
    copy = json.loads(json.dumps(config))
    part = copy
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return copy


def linked(source: Path, target: Path) -> None:
    """A checkpoint with the same weights and a configuration of its own."""
    for file in source.iterdir():
        if file.name != "config.json":
            os.link(file, target / file.name)


def trials(directories: list[Path], values: list[Any]) -> Iterator[tuple[str, Path]]:
    for source in directories:
        config = json.loads((source / "config.json").read_text())
        with tempfile.TemporaryDirectory(dir=source.parent) as name:
            linked(source, Path(name))
            for path in numbers(config):
                for value in values:
                    text = json.dumps(changed(config, path, value))
                    (Path(name) / "config.json").write_text(text)
                    yield f"{source.name}: {'.'.join(map(str, path))} = {value}", Path(name)


def peak() -> int:
    """The largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def attempt(directory: Path) -> str | None:
    """What is wrong with the answer, if anything is."""
    start, before = time.perf_counter(), peak()
    try:
        inspect(directory)
    except MoepruneError as error:
        if len(str(error).splitlines()) > 2:
            return f"{len(str(error).splitlines())} lines: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    seconds, grown = time.perf_counter() - start, peak() - before
    if seconds > SECONDS or grown > GROWTH:
        return f"{seconds:.0f} s, {grown} MiB"
    return None


def main(values: list[Any], directories: list[Path]) -> None:
    inspect(directories[0])  # what is imported once does not count
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    before = peak()
    count, wrong = 0, []
    for name, directory in trials(directories, values):
        count += 1
        if (problem := attempt(directory)) is not None:
            wrong.append(f"{name}: {problem}"[:400])
    print(json.dumps({"tried": count, "wrong": wrong, "grown_mib": peak() - before}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
