"""Where the time of a stage went, and what bounded it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

WAITING, COMPUTING, MERGING, HIDDEN = "waiting", "computing", "merging", "hidden"
LOADING = "loading"
"""Beside the others, in a thread of its own, and no part of their sum."""


class _Nested(threading.local):
    seconds: float = 0.0


class Profile:
    """Seconds by what they were spent on, and bytes of weights that were asked for.

    ``waiting`` for weights, ``computing`` layers, ``merging`` statistics, ``hidden`` states copied
    to their file, and ``loading`` in the background.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._lock = threading.Lock()
        self._nested = _Nested()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes = 0
        self.starved = False
        """Whether layers were not read ahead because there was no memory for it."""

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Count the block's time; what is spent inside of it on something else is not its own."""
        outer, self._nested.seconds = self._nested.seconds, 0.0
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.add(kind, spent - self._nested.seconds)
            self._nested.seconds = outer + spent

    def add(self, kind: str, seconds: float) -> None:
        """Count so many seconds."""
        with self._lock:
            self._seconds[kind] += seconds

    def read(self, sizes: Iterable[int]) -> None:
        """Count bytes of weights."""
        total = sum(sizes)
        with self._lock:
            self.bytes += total

    def move(self, kind: str, source: str, seconds: float) -> None:
        """Count seconds as ``kind`` which are counted as ``source`` as well."""
        with self._lock:
            self._seconds[kind] += seconds
            self._seconds[source] -= seconds

    def seconds(self) -> dict[str, float]:
        """Of the whole time since this was made; ``loading`` goes on beside the others."""
        total = time.perf_counter() - self._started
        kinds = (WAITING, COMPUTING, MERGING, HIDDEN)
        found = {kind: max(0.0, self._seconds[kind]) for kind in kinds}
        found["other"] = max(0.0, total - sum(found.values()))
        return {**found, LOADING: self._seconds[LOADING], "total": total}

    def bound(self) -> str:
        """``disk``, ``arithmetic`` or ``memory``: what more of would help most.

        Time in which the next layer could have been read, had there been room for it, is memory's.
        """
        seconds = self.seconds()
        waiting, hidden = seconds[WAITING], seconds[HIDDEN]
        parts = {
            "arithmetic": seconds[COMPUTING] + seconds[MERGING],
            "disk": 0.0 if self.starved else waiting,
            "memory": hidden + (waiting if self.starved else 0.0),
        }
        return max(parts, key=lambda name: (parts[name], name))
