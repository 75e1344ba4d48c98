"""Budgets given as the size that the result may have, and the search for the number that fits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeprune.core.budget import Budget
from moeprune.core.method import Method
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError, PlanError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s*([kmgt]i?b|b)?", re.IGNORECASE)
_UNITS: dict[str, int] = {"b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for i, base in (("", 1000), ("i", 1024))
}


@dataclass(frozen=True)
class Target:
    """The size of the result; exactly one of the first two fields is set.

    Attributes:
        bytes: of all tensors on disk, at most.
        parameters: values in all tensors, at most.
        multiple_of: as in ``Budget``.
    """

    bytes: int | None = None
    parameters: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.parameters is None):
            raise BudgetError("give exactly one of --target-bytes and --target-params")
        if self.size < 1:
            raise BudgetError(f"--{self.option} must be positive (got {self.size})")
        if self.multiple_of < 1:
            raise BudgetError(f"--multiple-of must be at least 1 (got {self.multiple_of})")

    @property
    def size(self) -> int:
        """The number that was given."""
        value = self.parameters if self.bytes is None else self.bytes
        assert value is not None
        return value

    @property
    def option(self) -> str:
        """Its name on the command line."""
        return "target-params" if self.bytes is None else "target-bytes"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "parameters" if self.bytes is None else "bytes"

    def accept(self, method: Method) -> None:
        """Raise ``BudgetError`` unless ``method`` makes checkpoints smaller by whole experts."""
        if "keep" not in method.budgets:
            raise BudgetError(
                f"{method.name} leaves every tensor its size: --{self.option} cannot be reached",
                "zeros are stored like any number; choose a method that removes experts",
            )
        if not method.chooses_experts:
            raise BudgetError(
                f"{method.name} does not choose experts: --{self.option} is met by removing those",
                "choose a method that removes, replaces or merges experts",
            )

        if shares_budget(method):
            try:
                method.accept(Budget(total=0))
            except BudgetError as error:
                raise BudgetError(
                    f"{method.name} shares a ratio out among layers, and cannot be given a total",
                    "use --ratio, or -o scope=layer",
                ) from error

    def candidates(self, method: Method, shapes: Sequence[LayerShape]) -> list[Budget]:
        """The budgets of ``method`` from nothing removed to everything removed, in that order.

        Experts kept per layer; where layers differ, the ratios at which a number changes; where
        layers compete (``scope``), experts kept in all layers together.
        """
        multiple = self.multiple_of
        if shares_budget(method):
            every = sum(shape.experts for shape in shapes)
            return [Budget(total=n, multiple_of=multiple) for n in range(every, -1, -1)]
        sizes = {shape.experts for shape in shapes}
        if len(sizes) == 1:
            [E] = sizes
            step = math.lcm(multiple, *(shape.groups for shape in shapes))
            kept = [E, *(n for n in range(E - 1, -1, -1) if n % step == 0)]
            if E % multiple:
                kept = kept[1:]
            return [Budget(keep=n, multiple_of=multiple) for n in kept]
        ratios = {n / size for size in sizes for n in range(size)}
        return [Budget(ratio=r, multiple_of=multiple) for r in sorted(ratios)]

    def search(
        self, method: Method, budgets: Sequence[Budget], size_of: Callable[[Budget], int]
    ) -> tuple[Budget, int]:
        """The first of ``budgets`` whose result fits, and its size.

        ``size_of`` is asked about as many budgets as a bisection needs; it may raise
        ``BudgetError`` or ``PlanError`` where a budget removes more than the method can.

        Raises:
            BudgetError: none fits; says how small the result can become.
        """
        known: dict[int, int | BudgetError | PlanError] = {}

        def size(i: int) -> int | BudgetError | PlanError:
            if i not in known:
                try:
                    known[i] = size_of(budgets[i])
                except (BudgetError, PlanError) as error:
                    known[i] = error
            return known[i]

        low, high = 0, len(budgets)  # everything before low is too large, everything from high not
        while low < high:
            middle = (low + high) // 2
            found = size(middle)
            if isinstance(found, int) and found > self.size:
                low = middle + 1
            else:
                high = middle
        best = size(low) if low < len(budgets) else None
        if isinstance(best, int):
            return budgets[low], best
        smallest = size(low - 1) if low else None
        if not isinstance(smallest, int):
            assert best is not None
            raise best
        because = f" ({best.problem})" if best is not None else ""
        raise BudgetError(
            f"--{self.option} {self.size} cannot be reached: the smallest result of {method.name} "
            f"has {smallest} {self.unit}{because}",
            f"give at least --{self.option} {smallest}",
        )


def shares_budget(method: Method) -> bool:
    """Whether a total is shared out among layers by ``scope``.

    ``Method.competes`` is wider: it holds for any method that decides about all layers at once.
    """
    return getattr(method, "scope", "layer") != "layer"


def parse_size(text: str, option: str) -> int:
    """``24GiB``, ``1.5 GB`` or a plain number such as ``8e9``; no units for ``target-params``.

    Raises:
        BudgetError: anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    counts = option == "target-params"
    if match is None or (match[2] and counts):
        example = "8e9" if counts else "24GiB, 900MB or 1.5e9"
        raise BudgetError(f"bad --{option} {text!r}", f"for example {example}")
    return math.floor(float(match[1]) * _UNITS[(match[2] or "b").lower()])
