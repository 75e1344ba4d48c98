"""What a recipe may say of a recovery: the options of ``moeprune recover``, under their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moeprune.errors import MoepruneError, nearest
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.recovery_steps import Recovery
from moeprune.recovery.training import Training, training

_OWN: dict[str, Any] = {
    "preset": str,
    "teacher": str | None,
    "data": tuple[str, ...],
    "mix": dict[str, Annotated[float, Field(ge=0.0)]],
    "sequences": int,
    "length": int,
    "processes": int,
}
_LISTS = ("train", "data")
_SEQUENCES, _LENGTH = 600, 512  # of moeprune recover


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RecoverPart:
    """A step that trains what the one before wrote.

    Attributes:
        recover: how, as ``moeprune recover --how``.
        options: as of ``moeprune recover`` and ``recovery.training.Training``, with underscores.
    """

    recover: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Misplaced(Exception):
    """A mistake, and the field of the step where it stands."""

    def __init__(self, place: tuple[str, ...], error: MoepruneError) -> None:
        super().__init__(str(error))
        self.place, self.error = place, error


def recovery_of(
    part: RecoverPart,
    seed: int,
    data: tuple[str, ...],
    sources: Callable[[tuple[str, ...]], tuple[str, ...]],
    model: Callable[[str], str],
) -> Recovery:
    """The recovery that a step asks for.

    Args:
        part: the step.
        seed: the recipe's, where the step has none.
        data: the recipe's calibration text, where the step has none.
        sources, model: what names of texts and of a model mean in the recipe.

    Raises:
        Misplaced: an unknown name, or a value that makes no sense.
    """
    given = _typed(part.options)
    own = {name: given.pop(name) for name in _OWN if name in given}
    given.setdefault("seed", seed)
    try:
        made = training(part.recover, own.get("preset"), given)
    except MoepruneError as error:
        raise Misplaced(_culprit(error, part), error) from error
    text = Text(
        sources(own.get("data", data)),
        own.get("sequences", _SEQUENCES),
        own.get("length", _LENGTH),
        given["seed"],
        tuple(own.get("mix", {}).items()),
    )
    teacher = own.get("teacher")
    return Recovery(
        made,
        text,
        None if teacher is None else model(teacher),
        own.get("processes", 1),
        taught=teacher is not None or "teacher" not in own,
    )


def _typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each of the type that it has to be."""
    known = {**get_type_hints(Training), **_OWN}
    del known["how"], known["adapter"]
    found = {}
    for name, value in options.items():
        if name == "adapter":
            problem = "a step writes a checkpoint, and an adapter is none"
            raise _bad(name, problem, "moeprune recover ... --adapter")
        if name not in known:
            raise _bad(name, f"unknown option {name!r} of recovery", nearest(name, known))
        try:
            found[name] = TypeAdapter(known[name]).validate_python(_listed(name, value))
        except ValidationError as error:
            raise _bad(name, f"{name}: {error.errors()[0]['msg']}", "") from error
    return found


def _listed(name: str, value: Any) -> Any:
    """A list may be written as the command line takes it."""
    if name not in _LISTS or not isinstance(value, str):
        return value
    return [one.strip() for one in value.split(",")] if name == "train" else [value]


def _bad(name: str, problem: str, hint: str) -> Misplaced:
    return Misplaced(("options", name), MoepruneError(problem, hint))


def _culprit(error: MoepruneError, part: RecoverPart) -> tuple[str, ...]:
    """The field that an error is about: the one whose flag or value it names."""
    for name, value in part.options.items():
        listed = _listed(name, value)
        values = listed if isinstance(listed, list) else [value]
        said = [repr(one) for one in values if isinstance(one, str)]
        said += [f"--{name.replace('_', '-')} "]
        if any(text in f"{error.problem} " for text in said):
            return ("options", name)
    return ("options",) if repr(part.recover) not in error.problem else ("recover",)
