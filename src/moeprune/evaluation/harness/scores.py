"""What a task's outcomes say: a share with its interval, and the difference paired by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats

from moeprune.evaluation.intervals import (
    LEVEL,
    Estimate,
    Interval,
    combined,
    estimate,
    mcnemar,
    proportion_difference,
    smallest_proportion_difference,
    verdict,
)

WANTED = 0.02
"""A difference of accuracy that matters: published tables differ by about so much."""

Numbers = Sequence[float]


def score(student: Numbers, teacher: Numbers | None = None) -> dict[str, Any]:
    """Mean over questions with its interval and, against a teacher on the same questions, the
    difference student - teacher with interval, exact McNemar p and a verdict.

    Args:
        student: one number per question; 0 and 1 are counted as shares.
        teacher: of the same questions in the same order.
    """
    own = _interval(student)
    found: dict[str, Any] = {
        "items": len(student),
        "value": own.value,
        "low": _finite(own.low),
        "high": _finite(own.high),
        "teacher": None,
        "difference": None,
        "p": None,
        "verdict": None,
    }
    if teacher is None:
        return found
    if len(teacher) != len(student):
        raise ValueError("teacher and student answered different questions")
    gap, p, smallest = _difference(student, teacher)
    return {
        **found,
        "teacher": math.fsum(teacher) / len(teacher),
        "difference": gap.to_json(),
        "p": p,
        "verdict": verdict(
            gap,
            smallest,
            WANTED,
            "points" if _binary(student, teacher) else "",
            worse=-1,
            form=".3f",
            things="questions",
            advice="give more questions, or a larger --limit",
        ),
    }


def _difference(student: Numbers, teacher: Numbers) -> tuple[Interval, float, float]:
    if _binary(student, teacher):
        pairs = list(zip(teacher, student, strict=True))
        lost, won = pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0))
        return (
            proportion_difference(lost, won, len(pairs)),
            mcnemar(lost, won),
            smallest_proportion_difference(lost, won, len(pairs)),
        )
    paired = _gaps(student, teacher)
    return paired.interval(), paired.p_value(), paired.smallest()


def mean_score(students: Sequence[Numbers], teachers: Sequence[Numbers] | None) -> dict[str, Any]:
    """The plain mean over several tasks, every task counting the same."""
    share = 1.0 / len(students)
    own = combined([(share, estimate(task, unit="questions")) for task in students])
    found: dict[str, Any] = {**_numbers(own.interval()), "teacher": None, "difference": None}
    if teachers is not None:
        parts = [_gaps(*both) for both in zip(students, teachers, strict=True)]
        gap = combined([(share, part) for part in parts])
        found["teacher"] = math.fsum(share * math.fsum(t) / len(t) for t in teachers)
        found["difference"] = gap.interval().to_json()
    return found


def _numbers(interval: Interval) -> dict[str, Any]:
    return {
        "value": interval.value,
        "low": _finite(interval.low),
        "high": _finite(interval.high),
    }


def _gaps(student: Numbers, teacher: Numbers) -> Estimate:
    gaps = [own - other for own, other in zip(student, teacher, strict=True)]
    return estimate(gaps, unit="questions")


def _interval(numbers: Numbers) -> Interval:
    """Wilson's interval of a share, Student's t of any other mean."""
    if _binary(numbers):
        right, count = int(sum(numbers)), len(numbers)
        ends = stats.binomtest(right, count).proportion_ci(LEVEL, method="wilson")
        return Interval(right / count, float(ends.low), float(ends.high), LEVEL, count, "Wilson")
    return estimate(numbers, unit="questions").interval()


def _binary(*several: Numbers) -> bool:
    return all(number in (0.0, 1.0) for numbers in several for number in numbers)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
