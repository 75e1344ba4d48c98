"""One model's evaluation as JSON: by domain, by group, and in sentences."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from moeprune.evaluation.kinds import CODE, LANGUAGES, MATHS, kind_of
from moeprune.evaluation.paired import WANTED, Paired, lost_more
from moeprune.evaluation.perplexity import Evaluation, pooled

ALL, SEEN, UNSEEN = "all", "seen", "unseen"


def summary(
    student: Evaluation,
    teacher: Evaluation | None = None,
    seen: Collection[str] | None = None,
    sequences: int = 0,
    wanted: float = WANTED,
) -> dict[str, Any]:
    """``domains``, ``groups`` and ``findings`` of ``moeprune.evaluation/1``.

    Args:
        student: what was measured.
        teacher: the model that it was compared with, on the same windows.
        seen: names of the domains that the student was calibrated on; None if that is not known.
        sequences: how many windows per domain were asked for; 0 for all.
        wanted: the difference that matters, nats per token.
    """
    groups = grouped(list(student.domains), seen)
    domains: dict[str, Any] = {}
    for name, score in student.domains.items():
        known = None if seen is None else name in seen
        domains[name] = {**score.to_json(), "seen": known}
    found: dict[str, Any] = {
        "domains": domains,
        "groups": {
            name: {
                **pooled(student.domains[member] for member in members).to_json(),
                "seen": {SEEN: True, UNSEEN: False}.get(name),
                "domains": members,
            }
            for name, members in groups.items()
        },
        "findings": [],
    }
    if teacher is None:
        return found
    pairs = paired(student, teacher)
    for name, pair in pairs.items():
        domains[name]["against"] = pair.to_json(wanted, sequences)
    for name, members in groups.items():
        pool = Paired.pooled([pairs[member] for member in members])
        found["groups"][name]["against"] = pool.to_json(wanted, sequences)
    found["findings"] = findings(pairs, groups, wanted)
    return found


def against(
    student: Evaluation, teacher: Evaluation, sequences: int = 0, wanted: float = WANTED
) -> dict[str, Any]:
    """The differences alone: by domain, and over ``all`` of them."""
    pairs = paired(student, teacher)
    pairs[ALL] = Paired.pooled(list(pairs.values()))
    return {name: pair.to_json(wanted, sequences) for name, pair in pairs.items()}


def paired(student: Evaluation, teacher: Evaluation) -> dict[str, Paired]:
    """The differences by domain."""
    return {
        name: Paired.of(name, score, teacher.domains[name])
        for name, score in student.domains.items()
    }


def grouped(domains: Sequence[str], seen: Collection[str] | None) -> dict[str, list[str]]:
    """Names of the domains of each group: all, seen and unseen ones, and kinds of text.

    Kinds go by the names; a kind that no domain or every domain has is no group.
    """
    groups = {ALL: list(domains)}
    if seen is not None:
        groups[SEEN] = [name for name in domains if name in seen]
        groups[UNSEEN] = [name for name in domains if name not in seen]
    for kind in (LANGUAGES, CODE, MATHS):
        members = [name for name in domains if kind_of(name) == kind]
        if len(members) < len(domains):
            groups[kind] = members
    return {name: members for name, members in groups.items() if members}


def findings(
    pairs: dict[str, Paired], groups: dict[str, list[str]], wanted: float = WANTED
) -> list[str]:
    """Which domains, and which groups of them, lost more than the others."""

    def pools(names: Sequence[str]) -> dict[str, Paired]:
        return {
            f"{name} ({', '.join(groups[name])})": Paired.pooled(
                [pairs[member] for member in groups[name]]
            )
            for name in names
            if name in groups
        }

    return [
        *lost_more(pairs, wanted, "the other domains"),
        *lost_more(pools((SEEN, UNSEEN)), wanted, "the others"),
        *lost_more(pools((LANGUAGES, CODE, MATHS)), wanted, "the other kinds of text"),
    ]
