"""The middle of a walk on disk: what a decoder layer made of every batch.

One safetensors file holds the outputs of one layer. A layer hands on a tensor, named by the number
of its batch, or a tuple, whose parts are named ``<batch>:<place>/<length>``; a place without name
is None. Batches are written and read one by one, so that a state may be larger than memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moeprune.errors import MoepruneError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.ranks import ALONE, Ranks
from moeprune.models.writer import Piece, given, write_file
from moeprune.work import WorkFolder

_PART = re.compile(r"(\d+):(\d+)/(\d+)")
_FILE = re.compile(r"layer-(\d{5})\.safetensors")
_SHARE = 0.1
"""Of the time, what may go into keeping the state of a walk."""
_KEPT = 2
"""States that are kept: if the newest is damaged, the walk goes on from the one before."""


@dataclass(frozen=True)
class Start:
    """Where a walk goes on.

    Attributes:
        layer: the last one that is done.
        file: what it made of every batch.
    """

    layer: int
    file: Path

    @cached_property
    def _places(self) -> dict[int, list[str]]:
        """Of batches whose output is a tuple, the names of its parts; "" where one is None."""
        found: dict[int, list[str]] = {}
        with safe_open(self.file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118  (no mapping)
                if part := _PART.fullmatch(name):
                    batch, place, length = map(int, part.groups())
                    found.setdefault(batch, [""] * length)[place] = name
        return found

    def output(self, index: int, device: torch.device) -> Any:
        """What the layer made of a batch."""
        names = self._places.get(index)
        with safe_open(self.file, "pt") as handle:
            # copies, at addresses like any result's: some kernels round by the address
            if names is None:
                return handle.get_tensor(str(index)).clone().to(device)
            return tuple(handle.get_tensor(n).clone().to(device) if n else None for n in names)

    def pass_on(self, index: int, entered: Any) -> Any:
        """What the layers before it hand on: their input, in the form of an output."""
        if index not in self._places:
            return entered
        return (entered, *self.output(index, torch.device("cpu"))[1:])


def refusal(model: LayeredModel) -> str | None:
    """Why a walk through this model cannot go on in its middle; None if it can."""
    config = text_config(model.config)
    key, reason = quirks.STATE_ASIDE.get(config.model_type, ("", ""))
    if reason and (not key or getattr(config, key, None)):
        return reason
    if type(model.model).__module__.startswith("transformers_modules"):
        return "what the code in its checkpoint keeps between layers is not known"
    return None


@dataclass
class Pace:
    """How often to keep something that can be made again: at most a tenth of the time goes there.

    Only when something is kept depends on the clock, and never what is computed.
    """

    spent: float = 0.0
    last: float = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.now()

    @staticmethod
    def now() -> float:
        """Seconds of its clock."""
        return time.monotonic()

    def due(self) -> bool:
        """Whether as long has passed as the last writing allows."""
        return self.spent <= _SHARE * (self.now() - self.last)

    def written(self, began: float) -> None:
        """Note that what began then has been written now."""
        self.last = self.now()
        self.spent = self.last - began


@dataclass
class WalkStates:
    """The newest states of one walk, in a work folder.

    Attributes:
        folder: where they stand.
        model: that is walked.
        name: of their folder within it.
        start: where the walk goes on; see ``resume``.
        ranks: processes that keep states of the other batches, behind the same layers.
    """

    folder: WorkFolder
    model: LayeredModel
    name: str = "walk"
    start: Start | None = None
    ranks: Ranks = ALONE
    _all: int = -1
    _pace: Pace = field(default_factory=Pace)
    _ended: bool = False

    @property
    def reached(self) -> int:
        """The last layer that is done when the walk starts; -1 if none is."""
        return self._all if self.start is None else self.start.layer

    @property
    def finished(self) -> bool:
        """Whether no layer is left."""
        return self._all == len(self.model.layers) - 1

    def resume(self, has: Callable[[int], bool], what: str, outputs: bool = False) -> Start | None:
        """Go on behind the newest whole state, if there is one; says so, or why there is none.

        Args:
            has: whether all else that was made of a layer is kept.
            what: goes on, for the note.
            outputs: what the last layer makes is wanted, and not only what ``has`` knows of.
        """
        layers = len(self.model.layers)
        own = next((index for index in range(layers) if not has(index)), layers)
        done = min(self.ranks.gather(own))
        if done == layers and not outputs:
            self._all = layers - 1
            return None
        why = refusal(self.model) or "no state of the walk is kept"
        layer = self._newest(done - 1)
        while len({*(newest := self.ranks.gather(layer))}) > 1:
            layer = self._newest(min(newest))  # where all can go on
        if layer >= 0:
            file = self.folder.path / self._file(layer)
            self.start = Start(layer, file)
            stopped = datetime.fromtimestamp(file.stat().st_mtime).strftime("%d %B, %H:%M")
            self.folder.note(
                f"going on after {layer + 1} of {layers} layers "
                f"({what} was interrupted after {stopped})"
            )
            return self.start
        if done:
            self.folder.note(f"{what} walks all layers again: {why}")
        return None

    def _newest(self, reached: int) -> int:
        """The last layer up to ``reached`` behind which a whole state is kept; -1 for none."""
        for layer in [] if refusal(self.model) else reversed(self.layers()):
            if layer <= reached and self.folder.find(self._file(layer)) is not None:
                return layer
        return -1

    def layers(self) -> list[int]:
        """Layers behind which a state was kept, ascending."""
        found = []
        for name in self.folder.names():
            place, _, file = name.rpartition("/")
            if place == self.name and (match := _FILE.fullmatch(file)):
                found.append(int(match[1]))
        return sorted(found)

    def save(
        self,
        layer: int,
        outputs: Sequence[object],
        always: bool = False,
        written: Callable[[int], None] = lambda batch: None,
    ) -> None:
        """Keep what a layer made of all batches, if it is time or has to be.

        A disk that is full ends the keeping, not the walk: there is a note. ``written`` is told
        each batch that has been.
        """
        if refusal(self.model) or not (always or self.ranks.broadcast(self._pace.due())):
            return
        if self._ended:
            return
        began = self._pace.now()
        try:
            with self.folder.new_file(self._file(layer)) as part:
                write_file(part, list(_pieces(outputs, written)))
        except (OSError, MoepruneError) as error:
            self._ended = True
            self.folder.note(
                f"the state of the walk can no longer be kept ({error}); the walk goes on, and "
                f"would begin behind {max(self.layers(), default=-1) + 1} layers if interrupted"
            )
            return
        for old in self.layers()[:-_KEPT]:
            self.folder.remove(self._file(old))
        self._pace.written(began)

    def clear(self) -> None:
        """Forget all states: what they were kept for is done."""
        for layer in self.layers():
            self.folder.remove(self._file(layer))

    def _file(self, layer: int) -> str:
        return f"{self.name}/layer-{layer:05d}.safetensors"


def _pieces(outputs: Sequence[object], written: Callable[[int], None]) -> Iterator[Piece]:
    for index, output in enumerate(outputs):
        if isinstance(output, Tensor):
            yield _telling(given(str(index), output), index, written)
            continue
        if not isinstance(output, tuple) or not isinstance(output[0], Tensor):
            raise UnsupportedModelError("its decoder layers do not hand on tensors")
        for place, part in enumerate(output):
            if part is not None:
                piece = given(f"{index}:{place}/{len(output)}", part)
                yield _telling(piece, index, written)


def _telling(piece: Piece, batch: int, written: Callable[[int], None]) -> Piece:
    def blocks() -> Iterator[bytes | memoryview]:
        yield from piece.blocks()
        written(batch)

    return replace(piece, blocks=blocks)
