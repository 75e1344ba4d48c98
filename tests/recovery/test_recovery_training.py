from __future__ import annotations

import math

import pytest
import torch

from moeprune.errors import DataError, MoepruneError
from moeprune.models.data import Domain
from moeprune.recovery.order import Order, split
from moeprune.recovery.training import TRAININGS, training


@pytest.mark.parametrize("how", TRAININGS)
def test_the_defaults_are_recipes(how: str) -> None:
    made = training(how)
    assert made.how == how
    assert training(how, None, {"steps": None}) == made
    assert made.to_json()["train"] == list(made.train)


@pytest.mark.parametrize(
    ("how", "preset", "options", "problem"),
    [
        ("magic", None, {}, "unknown way"),
        ("full", "moeits", {}, "no preset"),
        ("lora", "other", {}, "no preset"),
        ("full", None, {"train": ("heads",)}, "unknown group"),
        ("full", None, {"stepz": 3}, "unknown option"),
        ("full", None, {"steps": 0}, "--steps"),
        ("full", None, {"patience": -1}, "--patience"),
        ("full", None, {"evaluate_every": -1}, "--evaluate-every"),
        ("full", None, {"ce_weight": 0.0}, "no loss"),
        ("full", None, {"batch": 6, "accumulate": 4}, "cannot be cut"),
        ("full", None, {"learning_rate": math.nan}, "--learning-rate"),
        ("full", None, {"dtype": "int8"}, "cannot train"),
        ("full", None, {"adapter": True}, "--adapter"),
        ("expert-kd", None, {"target": "dense"}, "--target"),
    ],
)
def test_bad_recipes(how: str, preset: str | None, options: dict, problem: str) -> None:
    with pytest.raises(MoepruneError, match=problem):
        training(how, preset, options)


def test_the_preset_is_the_published_one_and_options_go_before_it() -> None:
    made = training("lora", "moeits", {"steps": 7})
    assert (made.rank, made.alpha, made.dropout, made.neftune) == (64, 16.0, 0.1, 5.0)
    assert (made.learning_rate, made.warmup, made.weight_decay) == (2e-4, 0.05, 0.05)
    assert made.steps == 7
    assert training("lora", "moeits").steps == 500


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    made = training("full", None, {"steps": 100, "warmup": 0.1, "learning_rate": 1.0})
    rates = [made.rate(1.0, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_every_sequence_is_read_once_before_any_is_read_twice() -> None:
    ids = torch.arange(7)[:, None]
    order = Order(ids, seed=3)
    row = torch.cat([order.rows(start, 2) for start in range(0, 14, 2)]).flatten().tolist()
    assert sorted(row[:7]) == sorted(row[7:]) == list(range(7))
    assert row[:7] != row[7:]
    again = Order(ids, seed=3)
    assert again.rows(9, 3).flatten().tolist() == row[9:12]  # wherever one begins


def test_held_out_sequences_are_not_trained_on() -> None:
    domains = [Domain("a", torch.arange(40).view(20, 2), 1.0), Domain("b", torch.ones(1, 2), 1.0)]
    train, held = split(domains, 0.1)
    assert [len(part.ids_NL) for part in train] == [18, 1]
    assert [len(part.ids_NL) for part in held] == [2, 0]
    assert not set(train[0].ids_NL.flatten().tolist()) & set(held[0].ids_NL.flatten().tolist())
    with pytest.raises(DataError, match="held out"):
        split(domains[1:], 0.1)
