"""The JSON of an evaluation, ``moeprune.evaluation/1``, as types that can check it.

The version rises when a key goes, changes its meaning, or may hold what it could not; keys that are
added to it are optional and leave the version alone.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = "moeprune.evaluation/1"
SECTIONS = ("tasks", "protocols", "generation", "efficiency")

_Number = float | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class IntervalJson(_Strict):
    """A number that was measured on a sample, and where it may lie."""

    value: _Number = Field(description="the estimate")
    low: _Number = Field(description="lower end; null if the sample cannot tell")
    high: _Number = Field(description="upper end; null if the sample cannot tell")
    level: float = Field(description="share of such samples whose interval holds the truth")
    items: int = Field(description="independent items that it rests on")
    method: str = Field(description="how it was computed, and what the items are")


class Against(_Strict):
    """Student against teacher, on the same windows."""

    loss: IntervalJson = Field(description="loss of the student minus loss of the teacher")
    kl: IntervalJson = Field(description="KL(teacher || student)")
    agreement: IntervalJson = Field(description="share of tokens with the same first choice")
    smallest: _Number = Field(
        description="smallest difference of loss that such a sample shows four times in five"
    )
    verdict: str = Field(description="of the loss, in words")


class Measured(_Strict):
    """One domain; means are over tokens, losses in nats per token."""

    tokens: int = Field(description="predicted tokens")
    windows: int = Field(description="windows that they stand in")
    seen: bool | None = Field(
        description="whether the model was calibrated or recovered on a domain of this name; "
        "null if there is no record, or the group holds both kinds"
    )
    loss: _Number = Field(description="mean of -log p(token)")
    perplexity: _Number = Field(description="exp(loss)")
    bits_per_byte: _Number = Field(description="loss / ln 2 / bytes per token")
    kl: _Number = Field(description="mean of KL(teacher || student); null without a teacher")
    agreement: _Number = Field(
        description="share of tokens at which both put the same token first; null without a teacher"
    )
    agreement_top5: _Number = Field(
        description="share of tokens at which the teacher's first choice is among the student's "
        "first five; null without a teacher"
    )
    against: Against | None = Field(None, description="only with a teacher")


class Group(Measured):
    """Several domains together, every token counting the same."""

    domains: list[str] = Field(description="which")


class Data(_Strict):
    """What was read."""

    hash: str = Field(description="SHA-256 of all token ids")
    tokens: int = Field(description="all tokens; the first of a window is not predicted")
    sequences: int = Field(description="windows")
    length: int = Field(description="tokens per window")
    domains: dict[str, int] = Field(description="windows by domain")


class EvaluationJson(_Strict):
    """The result of ``moeprune evaluate --json``."""

    format: Literal["moeprune.evaluation/1"]
    model: str = Field(description="what was measured")
    teacher: str | None = Field(description="what it was compared with")
    dtype: str = Field(description="in which both were computed")
    data: Data
    versions: dict[str, str] = Field(description="of Python and the libraries")
    seconds: float = Field(description="of the walk of the model")
    domains: dict[str, Measured] = Field(description="by name")
    groups: dict[str, Group] = Field(description="all, seen, unseen, languages, code, maths")
    findings: list[str] = Field(description="domains and groups that lost more, worst first")
    tasks: dict[str, Any] | None = Field(None, description="only if asked for")
    protocols: dict[str, Any] | None = Field(None, description="only with tasks")
    generation: dict[str, Any] | None = Field(None, description="only if asked for")
    efficiency: dict[str, Any] | None = Field(None, description="only if asked for")


def check(result: Any) -> EvaluationJson:
    """The result, typed.

    Raises:
        pydantic.ValidationError: it is not of this form; keys that are not known are refused.
    """
    return EvaluationJson.model_validate(result)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the result."""
    return EvaluationJson.model_json_schema()
