"""The command in a card draws the text again that the record tells of."""

from __future__ import annotations

import shlex

import pytest
import torch

from moeprune.cli.options import parse_mix
from moeprune.core.plan import Plan
from moeprune.models.data import Domain, demo_text, describe, draw
from moeprune.models.repeat import repeat_command, text_words

BUILT_IN = list(demo_text("calibration"))


def texts(names: list[str], sizes: list[int]) -> list[Domain]:
    sizes = sizes * len(names) if len(sizes) == 1 else sizes
    pages = [torch.arange(size * 4).view(size, 4) + place for place, size in enumerate(sizes)]
    return [Domain(name, page, 4.0) for name, page in zip(names, pages, strict=True)]


@pytest.mark.parametrize(
    ("names", "sizes", "sequences", "mix", "flags"),
    [
        (BUILT_IN, [40], 30, {}, set()),
        (BUILT_IN, [40], 4, {}, set()),  # not every domain has its turn
        (BUILT_IN, [40], 31, {"python": 3.0, "math": 0.0}, {"--data", "--mix"}),
        (["a", "b"], [40, 40], 21, {}, {"--data"}),
        (["a", "b"], [40, 3], 21, {}, {"--data", "--mix"}),  # one is short
        (["a", "b", "c"], [40], 20, {"b": 2.5}, {"--data", "--mix"}),
    ],
)
def test_the_words_draw_the_same_text(
    names: list[str], sizes: list[int], sequences: int, mix: dict[str, float], flags: set[str]
) -> None:
    all_of_it = texts(names, sizes)
    read = describe(draw(all_of_it, sequences, 7, mix))
    words = text_words(read)
    assert {word for word in words if word.startswith("--")} == flags | {"--sequences", "--length"}
    said = dict(zip(words[::2], words[1::2], strict=True))
    chosen = [word.removesuffix("=FILE") for word in words if word.endswith("=FILE")] or names
    again = draw(
        [domain for domain in all_of_it if domain.name in chosen],
        int(said["--sequences"]),
        7,
        dict(parse_mix(said.get("--mix"))),
    )
    assert describe(again) == read


def test_options_of_a_method_that_is_not_here_are_all_spelled() -> None:
    options = {"a": False, "b": 0, "c": None, "d": "x"}
    made = Plan({}, "elsewhere", options, {"ratio": 0.5}, {"name": "base"}, {}, 0)
    words = shlex.split(repeat_command(made))
    assert [word for word in words if "=" in word] == ["a=false", "b=0", "d=x"]
    assert words[:4] == ["moeprune", "prune", "base", "--method"] and words[-2:] == ["--out", "OUT"]
