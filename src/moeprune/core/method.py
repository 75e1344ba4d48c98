"""What a method is: a frozen dataclass of options that turns one layer's facts into a plan.

A method sees statistics and, if it asks for them, weights; it never touches the disk, transformers
or another method. The registry is the only mutable state of the package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from moeprune.core.budget import Budget
from moeprune.core.edits import ExpertWeights, StoredWeights
from moeprune.core.partial import PartialStatistics
from moeprune.core.plan import LayerPlan
from moeprune.core.residual import Residual
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import BudgetError, MoepruneError, nearest


class Block(Protocol):
    """One layer's experts as functions, in the arithmetic of the model itself."""

    def hidden(self, expert: int, x_SH: Tensor) -> Tensor:
        """The down matrix's input of one expert, float32 [S, I]."""
        ...

    def outputs(self, expert: int, x_SH: Tensor) -> Tensor:
        """The output of one expert before the gate, float32 [S, H]."""
        ...

    @property
    def gated_inputs(self) -> bool:
        """Whether the model multiplies the gate into the input and not into the output."""
        ...


def no_storage(layer: int, matrices: Mapping[tuple[int, str], Tensor]) -> StoredWeights:
    """Where there is nowhere to put matrices."""
    raise MoepruneError("this method changes weights, and there is nowhere to keep them")


@dataclass(frozen=True)
class LayerView:
    """What a method may look at to decide about one layer.

    Attributes:
        shape: the layer's sizes.
        statistics: sums over the calibration tokens; None if the method needs none.
        weights: the experts' matrices.
        block: loads the experts and gives them as functions; the layer is freed when the next one
            is asked for.
        again: runs the layer over the text again and yields these accumulators, of as many experts
            at a time as fit into so many bytes; only while a walk stands at the layer.
        router: reads the router's tensors that have one entry per output, float32 with that axis
            first, by their names; rows beyond E are not experts'.
        dense: the same layer's statistics in the unedited model, where ``statistics`` are of a
            model whose layers before this one are edited already; None elsewhere.
    """

    shape: LayerShape
    statistics: LayerStatistics | None
    weights: ExpertWeights
    block: Callable[[], Block] | None = None
    again: Callable[[Sequence[str], int], Iterator[PartialStatistics]] | None = None
    router: Callable[[], Mapping[str, Tensor]] | None = None
    dense: LayerStatistics | None = None

    def observe_parts(self, needs: Sequence[str], limit: int) -> Iterator[PartialStatistics]:
        """Statistics that are too large to collect at once, some experts after the other."""
        if self.again is None:
            raise MoepruneError("this method observes layers again, and there is no walk")
        return self.again(needs, limit)

    def router_rows(self) -> Tensor:
        """The experts' rows of the router's matrix, float32 [E, width of its input]."""
        found = {} if self.router is None else self.router()
        matrices = [t for _, t in sorted(found.items()) if t.ndim == 2 and t.shape[1] > 1]
        if len(matrices) != 1:
            raise MoepruneError(
                f"layer {self.shape.layer}: its router has {len(matrices)} matrices with one row "
                "per expert, and this method needs one"
            )
        return matrices[0][: self.shape.experts]

    def need_block(self) -> Block:
        """The experts as functions, or a clear error."""
        if self.block is None:
            raise MoepruneError("this method runs experts, and there is no model to run")
        return self.block()

    def need(self) -> LayerStatistics:
        """The statistics, or a clear error."""
        if self.statistics is None:
            raise MoepruneError(
                "this method scores experts on calibration text, and there are no statistics",
                "run moeprune calibrate first and give its output as --statistics",
            )
        return self.statistics


@dataclass(frozen=True)
class Context:
    """What belongs to the run and not to a layer.

    Attributes:
        budget: how much to remove.
        seed: for whatever is random.
        warn: takes a sentence for the user; it ends up in the plan.
        progress: called with (done, total, what) inside long computations.
        memo: what a method wants to find again when it plans the same model with another budget.
        store: keeps a layer's new matrices, by expert and role, where no edit can describe them.
        pinned: by layer, experts that must stay; the user's own and protected ones.
        forbidden: by layer, experts that must not stay.
    """

    budget: Budget
    seed: int = 0
    warn: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    memo: dict[Any, Any] = field(default_factory=dict)
    store: Callable[[int, Mapping[tuple[int, str], Tensor]], StoredWeights] = no_storage
    pinned: Mapping[int, frozenset[int]] = field(default_factory=dict)
    forbidden: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def pinned_in(self, layer: int) -> frozenset[int]:
        """Experts of a layer that must stay."""
        return self.pinned.get(layer, frozenset())

    def forbidden_in(self, layer: int) -> frozenset[int]:
        """Experts of a layer that must not stay."""
        return self.forbidden.get(layer, frozenset())


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods; a subclass is a frozen dataclass whose fields are its options.

    Class attributes:
        name: as on the command line.
        summary: one line for ``moeprune methods``.
        source: arXiv id of the paper.
        budgets: the budget kinds it understands (``ratio``, ``keep``, ``tau``, ``pattern``).
        needs: accumulators that it reads; empty for a data-free method.
        changes: what it does to values, as a verb phrase; None if it only deletes experts.
        keeps: what ``keep`` counts: ``experts``, ``neurons`` or ``layers``.
        unedited: the option that makes a sequential method score the unedited model instead.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    budgets: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ()
    changes: ClassVar[str | None] = None
    keeps: ClassVar[str] = "experts"
    unedited: ClassVar[str] = "propagate=dense"

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return False

    @property
    def observes(self) -> tuple[str, ...]:
        """Of ``needs``, what a sequential method wants collected before ``plan_layer``."""
        return self.needs

    @property
    def compares(self) -> tuple[str, ...]:
        """Accumulators of the unedited model that a sequential method reads as well."""
        return ()

    @abstractmethod
    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer from its own facts."""

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; methods in which layers compete override this.

        ``views`` may be iterated more than once; each pass loads one layer at a time.
        """
        return {view.shape.layer: self.plan_layer(view, context) for view in views}

    def plan_depth(self, residual: Residual, context: Context) -> tuple[int, ...]:
        """Decoder layers that go as a whole; asked of methods that need ``residual``."""
        return ()

    def per_layer(self) -> Method:
        """This method when every layer is to lose the same number; overridden if layers compete."""
        return self

    @property
    def competes(self) -> bool:
        """Whether layers compete: if not, ``plan_model`` is ``plan_layer`` of one after another."""
        return type(self).plan_model is not Method.plan_model

    @property
    def chooses_experts(self) -> bool:
        """Whether it decides which experts stay."""
        return "keep" in self.budgets and self.keeps == "experts"

    def accept(self, budget: Budget) -> None:
        """Raise ``BudgetError`` if this method does not understand ``budget``."""
        if budget.kind not in self.budgets:
            allowed = ", ".join(f"--{kind}" for kind in self.budgets)
            raise BudgetError(f"{self.name} has no --{budget.kind}", f"it takes {allowed}")
        if budget.multiple_of > 1 and not self.chooses_experts:
            raise BudgetError(f"{self.name} removes no experts: --multiple-of means nothing to it")

    def options(self) -> dict[str, Any]:
        """All options with their values, as they stand in a plan."""
        return asdict(self)


@dataclass
class _Registry:
    classes: dict[str, type[Method]] = field(default_factory=dict)
    loaded: bool = False


_REGISTRY = _Registry()
ENTRY_POINT_GROUP = "moeprune.methods"


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name; a class decorator for methods outside this package."""
    _REGISTRY.classes[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """All known methods by name: registered ones and those of installed entry points."""
    if not _REGISTRY.loaded:
        for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
            if point.name not in _REGISTRY.classes:
                _REGISTRY.classes[point.name] = _load(point)
        _REGISTRY.loaded = True
    return dict(sorted(_REGISTRY.classes.items()))


def _load(point: EntryPoint) -> type[Method]:
    try:
        loaded: type[Method] = point.load()
    except Exception as error:  # somebody else's package
        raise MoepruneError(
            f"method {point.name!r} ({point.value}) cannot be loaded: {error}",
            "repair or uninstall the package that offers it",
        ) from error
    return loaded


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """The method ``name`` with ``options``; strings are parsed into the options' types.

    Raises:
        MoepruneError: no such method, no such option, or a value that does not fit.
    """
    known = methods()
    if name not in known:
        raise MoepruneError(f"unknown method {name!r}", nearest(name, known))
    kind = known[name]
    allowed = [option.name for option in fields(kind)]
    for option in options or {}:
        if option not in allowed:
            raise MoepruneError(f"{name} has no option {option!r}", nearest(option, allowed))
    try:
        method = TypeAdapter(kind).validate_python(dict(options or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MoepruneError(f"{name}, option {where}: {first['msg']}") from error
    assert isinstance(method, Method)
    return method
