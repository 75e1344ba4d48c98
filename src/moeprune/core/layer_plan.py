"""What happens to the experts of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moeprune.core.edits import EditedExperts, ExpertWeights, MaskEdit, Neurons, StoredWeights
from moeprune.core.shapes import ROLES, LayerShape
from moeprune.core.skipping import Skipping
from moeprune.errors import PlanError


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one MoE layer.

    Experts that are neither kept nor replaced are deleted, together with their router rows; where
    a table over token ids chooses experts, its entries are redirected (``redirect_table``).

    Attributes:
        layer: index of the decoder layer.
        experts: E before the edit.
        keep: experts whose weights stay, ascending.
        replaced: experts that become constant vectors ("novices"), ascending.
        scores: the method's score per expert, by name; None where it has none.
        novices_NH: the constants of ``replaced``, in that order; or maps v + B A x of rank r, each
            packed into (1 + 2 r) H values: v, the rows of A, the columns of B.
        mask: weights to zero inside the kept experts.
        notes: what a reader of the plan should know about this layer.
        neurons: what the kept experts are rebuilt from: merged or narrowed experts.
        router_CE: new router rows as sums of old ones, one row per kept expert; None slices them.
        served_by: for each old expert the kept one that answers for it; router rows then stay as
            they are. None if nobody is answered for.
        offsets_CH: constants added to the outputs of the kept experts, before the gate.
        ranks: by role, the rank to which the matrix of each old expert is cut.
        stored: matrices that take the place of the kept experts' own.
        skipping: when a token may skip its weaker experts; nothing is done to the layer by it.
    """

    layer: int
    experts: int
    keep: tuple[int, ...]
    replaced: tuple[int, ...] = ()
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    novices_NH: Tensor | None = None
    mask: MaskEdit | None = None
    notes: tuple[str, ...] = ()
    neurons: Neurons | None = None
    router_CE: Tensor | None = None
    served_by: tuple[int, ...] | None = None
    offsets_CH: Tensor | None = None
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stored: StoredWeights | None = None
    skipping: Skipping | None = None

    @property
    def dropped(self) -> tuple[int, ...]:
        """Experts that are deleted, ascending."""
        stay = {*self.keep, *self.replaced}
        return tuple(e for e in range(self.experts) if e not in stay)

    def check(self, shape: LayerShape) -> None:
        """Raise ``PlanError`` unless this edit makes sense for a layer of that shape."""
        where = f"plan, layer {self.layer}"
        if self.experts != shape.experts:
            raise PlanError(f"{where}: made for {self.experts} experts, found {shape.experts}")
        for name in ("keep", "replaced"):
            ids = getattr(self, name)
            if list(ids) != sorted(set(ids)):
                raise PlanError(f"{where}: {name!r} must be ascending ids without repetition")
            if ids and not 0 <= min(ids) <= max(ids) < shape.experts:
                raise PlanError(f"{where}: {name!r} names an expert outside 0..{shape.experts - 1}")
        both = sorted(set(self.keep) & set(self.replaced))
        if both:
            raise PlanError(f"{where}: expert {both[0]} is both kept and replaced")
        remain = len(self.keep) + len(self.replaced)
        if self.served_by is not None:
            remain = shape.experts
        if remain < shape.top_k:
            raise PlanError(
                f"{where}: {remain} experts remain, but {shape.top_k} are selected per token",
                f"keep or replace at least {shape.top_k}",
            )
        if self.novices_NH is not None or self.replaced:
            size = () if self.novices_NH is None else tuple(self.novices_NH.shape)
            packed = len(size) == 2 and size[1] > 0 and size[1] % (2 * shape.hidden) == shape.hidden
            if not packed or size[0] != len(self.replaced):
                raise PlanError(
                    f"{where}: novices of shape {list(size)}, expected one row of {shape.hidden} "
                    f"for each of {len(self.replaced)} replaced experts",
                    "by hand, experts can be taken from 'replaced', but not added without a vector",
                )
        if self.mask is not None:
            self.mask.check(shape, where)
        self._check_rebuilt(shape, where)

    def _check_rebuilt(self, shape: LayerShape, where: str) -> None:
        C, H = len(self.keep), shape.hidden
        if self.neurons is not None:
            self.neurons.check(C, shape, where)
            if self.mask is not None and self.neurons.width != shape.intermediate:
                raise PlanError(
                    f"{where}: a mask cannot be put on experts that the same plan narrows",
                    "make it two steps: narrow, then mask the result",
                )
        for name, tensor, size in (
            ("router rows", self.router_CE, (C, shape.experts)),
            ("offsets", self.offsets_CH, (C, H)),
        ):
            if tensor is not None and tuple(tensor.shape) != size:
                raise PlanError(f"{where}: {name} of shape {list(tensor.shape)}, not {list(size)}")
        if self.served_by is not None:
            if len(self.served_by) != shape.experts or set(self.served_by) != set(self.keep):
                raise PlanError(f"{where}: 'served_by' must name a kept expert for each old one")
            if self.replaced or self.router_CE is not None:
                raise PlanError(f"{where}: experts that answer for others keep the router as it is")
        if self.replaced and (self.router_CE is not None or self.offsets_CH is not None):
            raise PlanError(f"{where}: router rows and outputs stay where experts are replaced")
        for role, ranks in self.ranks.items():
            if role not in shape.roles or len(ranks) != shape.experts or min(ranks) < 1:
                raise PlanError(f"{where}: bad ranks of {role!r} matrices")

    @property
    def unroutes(self) -> bool:
        """Whether the router loses rows: experts are deleted, and nobody answers for them."""
        return bool(self.dropped) and self.served_by is None

    @property
    def answers(self) -> bool:
        """Whether experts answer for others, or have constants in their outputs."""
        return self.served_by is not None or self.offsets_CH is not None

    @property
    def changed_roles(self) -> tuple[str, ...]:
        """The matrices of kept experts whose values change."""
        if self.neurons is not None:
            return ROLES
        mask = () if self.mask is None else self.mask.roles
        stored = () if self.stored is None else self.stored.roles
        return tuple(role for role in ROLES if role in {*mask, *stored, *self.ranks})

    @property
    def rebuilds(self) -> bool:
        """Whether matrices of kept experts get other values than zeros."""
        return self.neurons is not None or bool(self.ranks) or self.stored is not None

    def width(self, before: int) -> int:
        """The neurons of every kept expert; ``before`` is what they have without the edit."""
        return before if self.neurons is None else self.neurons.width

    def edited(self, old: ExpertWeights) -> EditedExperts:
        """The kept experts' new matrices."""
        return EditedExperts(old, self.keep, self.neurons, self.stored, self.ranks, self.mask)
