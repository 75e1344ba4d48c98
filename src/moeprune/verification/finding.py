"""Findings are data: which rule, how bad, where, what is wrong and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeprune.verification.subject import Subject

FORMAT = "moeprune.verification/1"
ERROR, WARNING, NOTE = "error", "warning", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        rule: which rule found it.
        severity: ``error`` (wrong or does not open), ``warning`` (works, but is not what it seems)
            or ``note`` (nothing to mend).
        file: the file in the checkpoint.
        tensor: the tensor, where it is about one.
        problem: what is wrong.
        remedy: what to do about it.
    """

    rule: str
    severity: str
    file: str
    tensor: str | None
    problem: str
    remedy: str


class Skip(Exception):
    """A rule cannot be checked on this checkpoint; the text says why."""


Found = Iterable[Finding]


@dataclass(frozen=True)
class Rule:
    """A check with the name that its findings carry.

    Attributes:
        id: the name.
        describes: what holds for a checkpoint that passes, in one line.
        check: yields findings; raises ``Skip`` where it has nothing to look at.
    """

    id: str
    describes: str
    check: Callable[[Subject], Found]


@dataclass(frozen=True)
class Verification:
    """What the rules found.

    Attributes:
        path: the checkpoint.
        findings: in order of the rules.
        skipped: rules that could not be checked, with the reason.
        rules: all rules, with what holds for a checkpoint that passes them.
        comparison: what was measured against the original; empty without one.
    """

    path: str
    findings: tuple[Finding, ...]
    skipped: Mapping[str, str]
    rules: Mapping[str, str]
    comparison: dict[str, Any] = field(default_factory=dict)

    def of(self, severity: str) -> list[Finding]:
        """Findings of one severity."""
        return [finding for finding in self.findings if finding.severity == severity]

    def passed(self, strict: bool = False) -> bool:
        """No errors; with ``strict`` no warnings either. Notes never count."""
        return not self.of(ERROR) and not (strict and self.of(WARNING))

    def to_json(self) -> dict[str, Any]:
        """As ``moeprune verify --json`` prints it."""
        return {
            "format": FORMAT,
            "path": self.path,
            "passed": self.passed(),
            "errors": len(self.of(ERROR)),
            "warnings": len(self.of(WARNING)),
            "findings": [asdict(finding) for finding in self.findings],
            "skipped": dict(self.skipped),
            "comparison": self.comparison,
            "rules": dict(self.rules),
        }
