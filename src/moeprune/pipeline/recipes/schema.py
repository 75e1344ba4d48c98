"""What a recipe may say (``moeprune.recipe/1``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moeprune.core.budget import Budget, parse_pattern
from moeprune.core.method import make_method
from moeprune.errors import MoepruneError, nearest
from moeprune.models.editing import Writing
from moeprune.pipeline.inputs import Compute, Text
from moeprune.pipeline.recipes.yaml_lines import Lines, parse
from moeprune.pipeline.steps import PROJECT, Step

FORMAT = "moeprune.recipe/1"
_MOST = 1 << 20
T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class TextPart:
    """Text: for calibration ``sequences`` in all, for evaluation per domain.

    Attributes:
        data: ``name=file`` or ``file``, relative to the recipe; none takes the embedded text.
        sequences, length: how much of it.
    """

    data: tuple[str, ...] = ()
    sequences: int = 128
    length: int = 2048


@dataclass(frozen=True, config=_STRICT)
class EvaluationPart:
    """As ``TextPart``; what is measured on it is compared with the original."""

    data: tuple[str, ...] = ()
    sequences: int = 64
    length: int = 256


@dataclass(frozen=True, config=_STRICT)
class StepPart:
    """One step.

    Attributes:
        method: its name.
        budget: one of ``ratio``, ``keep``, ``tau``, ``pattern`` or whatever budgets there are, and
            ``multiple_of``.
        options: of the method.
        uniform: the same number of experts in every layer.
        statistics: ``recompute`` walks the model that this step changes; ``project`` slices the
            statistics of the model before, which is no walk, and not the same.
        seed: of the method; none takes the recipe's.
    """

    method: str
    budget: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    uniform: bool = False
    statistics: Literal["recompute", "project"] = "recompute"
    seed: int | None = None


@dataclass(frozen=True, config=_STRICT)
class WritingPart:
    """Choices that no method makes; as of ``moeprune apply``."""

    pad: bool = False
    mtp: str = "keep-pruned"
    dequantize: bool = False


@dataclass(frozen=True, config=_STRICT)
class ComputePart:
    """Where to compute."""

    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 0


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """The whole document.

    Attributes:
        format: ``moeprune.recipe/1``.
        model: a directory (relative to the recipe if it begins with a dot), hub id, or ``demo``.
        steps: in order; each works on what the one before wrote.
        about: whatever a reader should know.
        out: the new checkpoint, if the command line does not say.
        seed: of the draw of text, and of methods.
        calibration, evaluation, writing, compute: see their classes; no evaluation measures
            nothing.
    """

    format: Literal["moeprune.recipe/1"]
    model: str
    steps: tuple[StepPart, ...]
    about: str = ""
    out: str | None = None
    seed: int = 0
    calibration: TextPart = TextPart()
    evaluation: EvaluationPart | None = None
    writing: WritingPart = WritingPart()
    compute: ComputePart = ComputePart()


@plain_dataclass(frozen=True)
class Loaded:
    """A recipe with the file that it came from."""

    recipe: Recipe
    path: Path
    lines: Lines

    def text(self) -> Text:
        """The calibration text."""
        part = self.recipe.calibration
        return Text(self._sources(part.data), part.sequences, part.length, self.recipe.seed)

    def heldout(self) -> Text | None:
        """The text to measure on."""
        part = self.recipe.evaluation
        if part is None:
            return None
        return Text(self._sources(part.data), part.sequences, part.length)

    def model(self) -> str:
        """The model; a path beginning with a dot is relative to the recipe."""
        name = self.recipe.model
        return str(self.path.parent / name) if name.startswith(".") else name

    def writing(self) -> Writing:
        """How it is written."""
        part = self.recipe.writing
        return self._at(("writing",), lambda: Writing(part.pad, part.mtp, part.dequantize))

    def compute(self) -> Compute:
        """Where to compute."""
        part = self.recipe.compute
        return Compute(part.device, part.dtype, part.workers)

    def steps(self) -> list[Step]:
        """The steps with their methods made.

        Raises:
            MoepruneError: an unknown method or option, or a budget that the method has not.
        """
        return [self.step(number) for number in range(len(self.recipe.steps))]

    def step(self, number: int) -> Step:
        """One of them."""
        part = self.recipe.steps[number]
        place = ("steps", number)
        method = self._at((*place, "method"), lambda: make_method(part.method, part.options))
        budget = self._at((*place, "budget"), lambda: budget_of(part.budget))
        self._at((*place, "budget"), lambda: method.accept(budget))
        if part.statistics == PROJECT and not number:
            raise self._error((*place, "statistics"), "the first step has nothing to project")
        seed = self.recipe.seed if part.seed is None else part.seed
        return Step(method, budget, part.uniform, part.statistics, seed)

    def _sources(self, data: tuple[str, ...]) -> tuple[str, ...]:
        found = []
        for source in data:
            name, separator, path = source.rpartition("=")
            found.append(f"{name}{separator}{self.path.parent / path}")
        return tuple(found)

    def _at(self, place: tuple[str | int, ...], make: Callable[[], T]) -> T:
        try:
            return make()
        except MoepruneError as error:
            raise self._error(place, error.problem, error.hint) from error

    def _error(self, place: tuple[str | int, ...], problem: str, hint: str = "") -> MoepruneError:
        return MoepruneError(f"{self.path}, line {self.lines.line(place)}: {problem}", hint)


def budget_of(values: Mapping[str, Any]) -> Budget:
    """A budget from its fields.

    Raises:
        MoepruneError: there is no such field, or a value does not fit.
    """
    given, known = dict(values), [entry.name for entry in fields(Budget)]
    for name in given:
        if name not in known:
            raise MoepruneError(f"there is no budget {name!r}", nearest(name, known))
    if isinstance(given.get("pattern"), str):
        given["pattern"] = parse_pattern(given["pattern"])
    try:
        return TypeAdapter(Budget).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise MoepruneError(f"budget {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def load_recipe(path: Path) -> Loaded:
    """Read and check a recipe; methods are looked up when ``steps`` is called.

    Raises:
        MoepruneError: no such file, not YAML, or not a recipe; with the line and the field.
    """
    if not path.is_file():
        raise MoepruneError(f"no recipe at {path}", "see recipes/ for examples")
    content = path.read_bytes()
    if len(content) > _MOST:
        raise MoepruneError(f"{path} is larger than {_MOST >> 20} MiB: no recipe")
    try:
        lines = parse(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise MoepruneError(f"{path} is not UTF-8 text: {error}") from error
    recipe = _validated(lines, path)
    if not recipe.steps:
        raise MoepruneError(f"{path}, line {lines.line(('steps',))}: no step")
    return Loaded(recipe, path, lines)


def _validated(lines: Lines, path: Path) -> Recipe:
    if not isinstance(lines.value, dict):
        raise MoepruneError(f"{path}: a recipe is a mapping", f"it begins with format: {FORMAT}")
    try:
        return TypeAdapter(Recipe).validate_python(lines.value)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(first["loc"])
        name = ".".join(map(str, place)) or "it"
        message = {
            "unexpected_keyword_argument": "there is no such field",
            "missing": "is missing",
            "missing_argument": "is missing",
        }.get(first["type"], first["msg"])
        where = f"{path}, line {lines.line(place)}"
        raise MoepruneError(f"{where}: {name}: {message}", "docs/recipes.md has all") from error
