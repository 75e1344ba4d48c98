"""Runs every rule on a checkpoint."""

from __future__ import annotations

from moeprune.verification import (
    against,
    attached,
    configuration,
    experts,
    files,
    numbers,
    provenance,
    quantisation,
    rebuilt,
    shapes,
    tokenizer,
)
from moeprune.verification.finding import ERROR, Finding, Rule, Skip, Verification
from moeprune.verification.subject import CONFIG, Subject

RULES: tuple[Rule, ...] = (
    *files.RULES,
    *configuration.RULES,
    *shapes.RULES,
    *experts.RULES,
    *rebuilt.RULES[:2],
    *quantisation.RULES,
    *attached.RULES,
    *numbers.RULES,
    *tokenizer.RULES,
    *provenance.RULES,
    *against.RULES[:-1],
    *rebuilt.RULES[2:],
    *against.RULES[-1:],
)
"""Every rule, in the order in which they are run."""


def run(subject: Subject) -> Verification:
    """Check every rule; whatever is wrong with the checkpoint becomes a finding."""
    findings: list[Finding] = []
    skipped: dict[str, str] = {}
    for rule in RULES:
        found: list[Finding] = []
        try:
            for finding in rule.check(subject):
                found.append(finding)
        except Skip as reason:
            skipped[rule.id] = str(reason)
        except Exception as error:  # a file so broken that even the rule trips over it
            problem = f"this could not be checked: {type(error).__name__}: {error}"[:200]
            remedy = "mend the other findings first, and verify again"
            found.append(Finding(rule.id, ERROR, CONFIG, None, problem, remedy))
        findings += found
    return Verification(
        str(subject.path),
        tuple(findings),
        skipped,
        {rule.id: rule.describes for rule in RULES},
        subject.comparison,
    )


def rules_table() -> str:
    """All rules as a table in Markdown, for the documentation."""
    rows = [f"| `{rule.id}` | {rule.describes} |" for rule in RULES]
    return (
        "\n".join(["| rule | what holds for a checkpoint that passes |", "|---|---|", *rows]) + "\n"
    )
