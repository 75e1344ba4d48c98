"""Generation health: whether a model loops, repeats itself, or does not stop; beside its teacher.

Every prompt is an item: what is compared is the difference between two answers to the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from scipy import stats

from moeprune.evaluation import intervals
from moeprune.evaluation.answers import Answer, Decoding, Prompt
from moeprune.evaluation.degeneration import distinct, find_loop, first_difference, repetition
from moeprune.evaluation.shares import Pairs

EXAMPLES = 3
_FORM = ".3g"
_ADVICE = "give more with --prompts-per-domain or --prompts"


@dataclass(frozen=True)
class Measure:
    """One number about an answer.

    Attributes:
        name: in the JSON.
        words: in sentences.
        of: the number; 0 or 1 if it is ``binary``.
        binary: whether it is a yes or no.
        worse: 1 if more of it is worse, -1 if less is, 0 if neither.
        wanted: the smallest difference that matters.
        unit: of a difference.
    """

    name: str
    words: str
    of: Callable[[Answer], float]
    binary: bool = False
    worse: int = 1
    wanted: float = 0.02
    unit: str = ""


MEASURES = (
    Measure("loop", "answers that end in a loop", lambda a: find_loop(a.ids) is not None, True),
    Measure("unended", "answers without an end", lambda a: not a.ended, True, wanted=0.05),
    Measure("repetition", "repeated 4-grams", lambda a: repetition(a.ids)),
    Measure("distinct_1", "distinct tokens", lambda a: distinct(a.ids, 1), worse=-1),
    Measure("distinct_2", "distinct 2-grams", lambda a: distinct(a.ids, 2), worse=-1),
    Measure("distinct_3", "distinct 3-grams", lambda a: distinct(a.ids, 3), worse=-1),
    Measure(
        "length", "length", lambda a: float(len(a.ids)), worse=0, wanted=5.0, unit=" tokens"
    ),
)  # fmt: skip
NEVER_STOPS = "not applicable: the teacher ended no answer within the limit"


def assess(
    prompts: Sequence[Prompt],
    mine: Sequence[Answer],
    teachers: Sequence[Answer] | None,
    decoding: Decoding,
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """One way of decoding: measures of the model, of its teacher, and of their difference.

    Args:
        prompts: what was asked.
        mine, teachers: an answer to each; None without a teacher.
        decoding: how the answers were made.
        decode: turns tokens into text, for examples.

    Returns:
        JSON types; docs/generation.md describes them.
    """
    result: dict[str, Any] = {
        "name": decoding.name,
        "temperature": decoding.temperature,
        "prompts": len(prompts),
        "measures": {m.name: _measure(m, mine, teachers) for m in MEASURES},
        "domains": _domains(prompts, mine, teachers),
    }
    if teachers is not None:
        result["never_ending"] = _never_ending(mine, teachers)
        result["changed"] = _changed(mine, teachers)
        result["examples"] = _examples(prompts, mine, teachers, decode)
    return result


def _measure(
    measure: Measure, mine: Sequence[Answer], teachers: Sequence[Answer] | None
) -> dict[str, Any]:
    own = [float(measure.of(answer)) for answer in mine]
    found: dict[str, Any] = {"model": _own(measure, own)}
    if teachers is None:
        return found
    other = [float(measure.of(answer)) for answer in teachers]
    found["teacher"] = _own(measure, other)
    if measure.binary:
        pairs = Pairs.of(other, own)
        interval, p_value = pairs.interval(), pairs.p_value()
        said = pairs.verdict(measure.wanted, measure.worse, _FORM, things="prompts", advice=_ADVICE)
    else:
        differences = [a - b for a, b in zip(own, other, strict=True)]
        estimated = intervals.estimate(differences, unit="prompts")
        interval, p_value = estimated.interval(), estimated.p_value()
        said = _verdict(measure, interval, estimated.smallest())
    return {**found, "against": interval.to_json(), "p_value": p_value, "verdict": said}


def _own(measure: Measure, values: Sequence[float]) -> dict[str, Any]:
    """The mean of one model with its interval."""
    if not measure.binary:
        return intervals.estimate(values, unit="prompts").interval().to_json()
    count, items = int(sum(values)), len(values)
    ends = stats.binomtest(count, items).proportion_ci(intervals.LEVEL, "wilson")
    return intervals.Interval(
        count / items, float(ends.low), float(ends.high), intervals.LEVEL, items, "Wilson"
    ).to_json()


def _verdict(measure: Measure, interval: intervals.Interval, smallest: float) -> str:
    points = not measure.unit  # shares are told in points of a hundred
    factor, unit = (100.0, "points") if points else (1.0, measure.unit.strip())
    said = intervals.verdict(
        interval.times(factor), smallest * factor, measure.wanted * factor, unit,
        worse=measure.worse or 1, form=_FORM, things="prompts", advice=_ADVICE,
    )  # fmt: skip
    if measure.worse == 0:  # a longer answer is neither better nor worse
        said = said.replace("worse by", "longer by").replace("better by", "shorter by")
    return said


def _never_ending(mine: Sequence[Answer], teachers: Sequence[Answer]) -> dict[str, Any]:
    """Of the answers that the teacher ended, the share that the model did not."""
    still = [not a.ended for a, b in zip(mine, teachers, strict=True) if b.ended]
    if not still:
        return {"share": None, "of": 0, "verdict": NEVER_STOPS}
    share = sum(still) / len(still)
    words = f"{sum(still)} of the {len(still)} answers that the teacher ended had no end"
    return {"share": share, "of": len(still), "verdict": words}


def _changed(mine: Sequence[Answer], teachers: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are not the teacher's, and after how many tokens they part."""
    places = [
        place
        for a, b in zip(mine, teachers, strict=True)
        if (place := _parting(a, b)) is not None
    ]  # fmt: skip
    return {
        "share": len(places) / len(mine),
        "after_tokens_median": float(median(places)) if places else None,
        "after_tokens_least": min(places, default=None),
    }


def _parting(a: Answer, b: Answer) -> int | None:
    place = first_difference(a.ids, b.ids)
    if place is None and a.ended != b.ended:
        return len(a.ids)
    return place


def _domains(
    prompts: Sequence[Prompt], mine: Sequence[Answer], teachers: Sequence[Answer] | None
) -> dict[str, Any]:
    """Means by domain; each has few prompts, so there are no intervals."""
    found: dict[str, Any] = {}
    for name in sorted({prompt.domain for prompt in prompts}):
        rows = [row for row, prompt in enumerate(prompts) if prompt.domain == name]

        def means(answers: Sequence[Answer], rows: list[int] = rows) -> dict[str, float]:
            return {m.name: sum(m.of(answers[r]) for r in rows) / len(rows) for m in MEASURES}

        found[name] = {"prompts": len(rows), "model": means(mine)}
        if teachers is not None:
            found[name]["teacher"] = means(teachers)
    return found


def _examples(
    prompts: Sequence[Prompt],
    mine: Sequence[Answer],
    teachers: Sequence[Answer],
    decode: Callable[[Sequence[int]], str],
) -> list[dict[str, Any]]:
    """The first answers that loop where the teacher's does not."""
    found: list[dict[str, Any]] = []
    for prompt, a, b in zip(prompts, mine, teachers, strict=True):
        loop = find_loop(a.ids)
        if loop is None or find_loop(b.ids) is not None or len(found) == EXAMPLES:
            continue
        texts = {"prompt": prompt.ids, "model": a.ids, "teacher": b.ids}
        found.append(
            {
                "domain": prompt.domain,
                "period": loop.period,
                "looping_tokens": loop.tokens,
                **{key: decode(ids) for key, ids in texts.items()},
            }
        )
    return found


def findings(decodings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the measures say, in sentences; p-values are adjusted for how many there are (Holm)."""
    told: list[str] = []
    cells = [
        (decoding, measure, decoding["measures"][measure.name])
        for decoding in decodings
        for measure in MEASURES
        if "against" in decoding["measures"][measure.name]
    ]
    adjusted = intervals.holm([cell["p_value"] for *_, cell in cells]).tolist()
    for (decoding, measure, cell), p_value in zip(cells, adjusted, strict=True):
        if p_value < 1.0 - intervals.LEVEL and cell["against"]["items"] >= intervals.FEWEST:
            values = " against ".join(
                _number(measure, cell[who]["value"]) for who in ("model", "teacher")
            )
            told.append(f"{decoding['name']}: {measure.words} {values}: {cell['verdict']}")
    for decoding in decodings:
        if decoding.get("changed", {}).get("share") == 0.0:
            told.append(f"{decoding['name']}: all {decoding['prompts']} answers are the teacher's")
    if cells and not told:
        told.append(_nothing(cells))
    for decoding in decodings:
        never = decoding.get("never_ending")
        if never and never["share"]:
            told.append(f"{decoding['name']}: {never['verdict']}")
    return told


def _nothing(cells: Sequence[tuple[Mapping[str, Any], Measure, Mapping[str, Any]]]) -> str:
    small = [(d, m, c) for d, m, c in cells if m.name == "loop" and "too small" in c["verdict"]]
    if small:
        decoding, measure, cell = small[0]
        return f"{decoding['name']}: {measure.words}: {cell['verdict']}"
    return "no difference shown in loops, repetition, distinct n-grams, length or ends"


def _number(measure: Measure, value: float) -> str:
    return f"{value:.1f}{measure.unit}" if measure.unit else f"{value:.1%}"
