"""What a comparison is asked for: which methods with which options, how much, on which text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeprune.core.budget import Budget
from moeprune.core.method import Method, make_method, methods
from moeprune.errors import DataError, MoepruneError, nearest
from moeprune.models.data import parse_sources
from moeprune.pipeline.inputs import Text

ALL = "all"


@dataclass(frozen=True)
class Entry:
    """A method with the options that were given, and what it is called in tables.

    Attributes:
        label: as it was asked for, ``name`` or ``name:option=value,option=value``.
        method: the method, its other options at their defaults.
    """

    label: str
    method: Method


@dataclass(frozen=True)
class Calibration:
    """Text to score on: some domains, and how many sequences of them in all.

    Attributes:
        name: in tables and of folders.
        text: what to read.
        parts: domains with their numbers of sequences, if it is to be merged from them.
    """

    name: str
    text: Text
    parts: tuple[tuple[str, Text], ...] = ()


@dataclass(frozen=True)
class Cell:
    """One method with one budget, seed and calibration."""

    entry: Entry
    budget: Budget
    seed: int
    calibration: Calibration

    @property
    def key(self) -> str:
        """What tells it from the other cells of a run."""
        asked = ",".join(f"{name}={value}" for name, value in self.budget.to_json().items())
        return f"{self.entry.label} {asked} seed={self.seed} text={self.calibration.name}"

    @property
    def slug(self) -> str:
        """A name for files: readable, and different for different cells."""
        readable = re.sub(r"[^A-Za-z0-9.]+", "-", self.key)[:80].strip("-")
        return f"{readable}-{hashlib.sha256(self.key.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Asked:
    """Everything that is to be compared."""

    entries: Sequence[Entry]
    budgets: Sequence[Budget]
    calibrations: Sequence[Calibration]
    seeds: Sequence[int] = field(default=(0,))

    def cells(self) -> Iterator[Cell]:
        """All of them; the budgets of one method stand together, so that they can share work.

        A method that reads no text is there once, whatever texts are compared.
        """
        for number, calibration in enumerate(self.calibrations):
            for entry in self.entries:
                if number and not entry.method.needs:
                    continue
                for seed in self.seeds:
                    for budget in self.budgets:
                        yield Cell(entry, budget, seed, calibration)


def parse_methods(asked: str | Sequence[str]) -> list[Entry]:
    """``a,b:option=value,option=value,c`` or ``all``: every method with its default options.

    A piece between commas that holds ``=`` before any ``:`` is a further option of the method
    before it; every other piece begins a method. A list of strings is joined by commas.

    Raises:
        MoepruneError: an unknown method or option, a bad value, or one method asked for twice.
    """
    text = asked if isinstance(asked, str) else ",".join(asked)
    found: list[tuple[str, dict[str, str]]] = []
    for piece in (part.strip() for part in text.split(",")):
        head, _, rest = piece.partition(":")
        if not piece:
            continue
        if "=" in head:
            if not found:
                raise MoepruneError(
                    f"option {piece!r} belongs to no method", "write name:option=value"
                )
            _add_option(found[-1], piece)
        elif head == ALL and not rest:
            found += [(name, {}) for name in methods()]
        else:
            found.append((head, {}))
            if rest:
                _add_option(found[-1], rest)
    entries = [_entry(name, options) for name, options in found]
    labels = [entry.label for entry in entries]
    twice = [label for label in labels if labels.count(label) > 1]
    if not entries:
        raise MoepruneError("no method was named", f"known: all, {', '.join(methods())}")
    if twice:
        raise MoepruneError(f"--methods names {twice[0]!r} twice")
    return entries


def _add_option(method: tuple[str, dict[str, str]], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator:
        raise MoepruneError(f"{method[0]}: {text!r} is no option", "write name:option=value")
    method[1][name.strip().replace("-", "_")] = value.strip()


def _entry(name: str, options: Mapping[str, str]) -> Entry:
    given = ",".join(f"{option}={value}" for option, value in options.items())
    return Entry(f"{name}:{given}" if given else name, make_method(name, options))


def calibrations(text: Text, domains: Sequence[str], sequences: Sequence[int]) -> list[Calibration]:
    """The calibration texts: domains by sample counts, or ``text`` as it is.

    Args:
        text: where the text comes from, its length and seed.
        domains: names joined by ``+``, or ``all``; none takes all text.
        sequences: numbers of sequences in all; none takes that of ``text``.

    Raises:
        DataError: an unknown domain, or a domain named twice.
    """
    if not domains and len(sequences) < 2:
        count = sequences[0] if sequences else text.sequences
        return [Calibration(f"all-{count}", _with(text, text.sources, count))]
    files = parse_sources(text.sources, "calibration")
    found = []
    for asked in domains or (ALL,):
        names = sorted(files) if asked == ALL else [name.strip() for name in asked.split("+")]
        for name in names:
            if name not in files:
                raise DataError(f"no calibration text {name!r}", nearest(name, files))
            if names.count(name) > 1:
                raise DataError(f"--calibration-domains {asked}: {name!r} stands there twice")
        found += [_combined(text, files, asked, sorted(names), count) for count in sequences or (
            text.sequences,)]  # fmt: skip
    labels = [calibration.name for calibration in found]
    if len(set(labels)) < len(labels):
        raise DataError("a calibration text is asked for twice")
    return found


def _combined(
    text: Text, files: Mapping[str, Path], asked: str, names: Sequence[str], count: int
) -> Calibration:
    """The sequences that ``moeprune calibrate`` draws for these domains, domain by domain."""
    sources = {name: f"{name}={files[name]}" for name in names}
    parts = []
    for position, name in enumerate(names):
        share = count // len(names) + (position < count % len(names))
        if share:
            parts.append((f"{name}-{share}", _with(text, (sources[name],), share)))
    whole = _with(text, tuple(sources.values()), count)
    return Calibration(f"{asked}-{count}", whole, tuple(parts))


def _with(text: Text, sources: Sequence[str], sequences: int) -> Text:
    return Text(tuple(sources), sequences, text.length, text.seed)
