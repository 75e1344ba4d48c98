"""What a task's outcomes say: a share with its interval, and the difference paired by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from moeprune.evaluation.intervals import LEVEL, Estimate, Interval, estimate, verdict
from moeprune.evaluation.shares import Pairs

_Z = float(stats.norm.ppf(0.5 + LEVEL / 2.0))
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
    return {**found, "teacher": math.fsum(teacher) / len(teacher), **_difference(student, teacher)}


def _difference(student: Numbers, teacher: Numbers) -> dict[str, Any]:
    advice = "give more questions, or a larger --limit"
    if _binary(student, teacher):
        pairs = Pairs.of(teacher, student)
        gap, p = pairs.interval(), pairs.p_value()
        said = pairs.verdict(WANTED, worse=-1, form=".1f", things="questions", advice=advice)
    else:
        paired = _gaps(student, teacher)
        gap, p = paired.interval(), paired.p_value()
        said = verdict(
            gap, paired.smallest(), WANTED, "", -1, ".3f", things="questions", advice=advice
        )
    return {"difference": gap.to_json(), "p": p, "verdict": said}


def mean_score(students: Sequence[Numbers], teachers: Sequence[Numbers] | None) -> dict[str, Any]:
    """The plain mean over several tasks, every task counting the same.

    The intervals are normal, around the mean itself. Only variances are of the tasks' adjusted
    shares (Agresti and Coull) or differences (Bonett and Price), so that a task on which nothing
    varied is not taken as certain: adjusted shares all err towards one half, and their mean would
    keep the error of one of them with the width of many.
    """
    own = _mean([_share(task) for task in students], (0.0, 1.0))
    found: dict[str, Any] = {
        "value": own.value,
        "low": own.low,
        "high": own.high,
        "teacher": None,
        "difference": None,
    }
    if teachers is not None:
        gap = _mean([_gap(*both) for both in zip(students, teachers, strict=True)], (-1.0, 1.0))
        found["teacher"] = math.fsum(math.fsum(t) / len(t) for t in teachers) / len(teachers)
        found["difference"] = gap.to_json()
    return found


@dataclass(frozen=True)
class _Part:
    """One task: its value, the variance of that, its questions."""

    value: float
    variance: float
    items: int


def _mean(parts: Sequence[_Part], bounds: tuple[float, float]) -> Interval:
    count = len(parts)
    half = _Z * math.sqrt(math.fsum(part.variance for part in parts)) / count
    value = math.fsum(part.value for part in parts) / count
    low, high = max(bounds[0], value - half), min(bounds[1], value + half)
    items = sum(part.items for part in parts)
    return Interval(value, low, high, LEVEL, items, "normal, variances of adjusted shares")


def _share(numbers: Numbers) -> _Part:
    value, count = math.fsum(numbers) / len(numbers), len(numbers)
    if not _binary(numbers):
        return _Part(value, estimate(numbers, unit="questions").error ** 2, count)
    middle = (math.fsum(numbers) + 2.0) / (count + 4.0)
    return _Part(value, middle * (1.0 - middle) / count, count)


def _gap(student: Numbers, teacher: Numbers) -> _Part:
    count = len(student)
    if not _binary(student, teacher):
        paired = _gaps(student, teacher)
        return _Part(paired.value, paired.error**2, count)
    pairs = Pairs.of(teacher, student)
    first, second = (pairs.only_first + 1) / (count + 2), (pairs.only_second + 1) / (count + 2)
    variance = (first + second - (second - first) ** 2) / (count + 2)
    return _Part((pairs.only_second - pairs.only_first) / count, variance, count)


def _gaps(student: Numbers, teacher: Numbers) -> Estimate:
    gaps = [own - other for own, other in zip(student, teacher, strict=True)]
    return estimate(gaps, unit="questions")


def _interval(numbers: Numbers) -> Interval:
    """Wilson's interval of a share, bootstrap-t of any other mean."""
    if _binary(numbers):
        right, count = int(sum(numbers)), len(numbers)
        ends = stats.binomtest(right, count).proportion_ci(LEVEL, method="wilson")
        return Interval(right / count, float(ends.low), float(ends.high), LEVEL, count, "Wilson")
    return estimate(numbers, unit="questions").interval()


def _binary(*several: Numbers) -> bool:
    return all(number in (0.0, 1.0) for numbers in several for number in numbers)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
