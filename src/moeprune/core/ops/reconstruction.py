"""How far a layer's output moves when some of its experts are gone, for many subsets at once.

The outputs f_e(x) of all experts are computed once per sampled token; a subset is then a matter of
gates. With d = g_D - g, the change of a token's gates over the experts, the change of its output is
``sum_e d_e f_e``, whose squared norm is ``d^T G d`` with G the token's Gram matrix of the outputs.
So the outputs themselves are not kept, and a subset costs S E^2 multiplications, not S K H.

Axes: S sampled tokens, E experts, H width of the block, N subsets.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeprune.core.ops.routing import SubsetRouter

Norm = Literal["frobenius", "token"]

_OUTPUTS = 1 << 24  # float64 outputs in memory at once, of all experts for some tokens
_GATES = 1 << 21  # float64 gates in memory at once


@dataclass(frozen=True)
class OutputGram:
    """Inner products of the experts' outputs, token by token.

    Attributes:
        gram_SEE: <f_i(x_s), f_j(x_s)>, float64.
        cross_SE: <f_i(x_s), r_s>, with r the output of the layer minus a target; None if the
            target is the layer's own output.
        rest_S: |r_s|^2; None likewise.
        broken: experts with outputs that are not finite; they count as zeros.
    """

    gram_SEE: Tensor
    cross_SE: Tensor | None = None
    rest_S: Tensor | None = None
    broken: tuple[int, ...] = ()


def finite_rows(f_nH: Tensor) -> Tensor:
    """``f_nH`` with zeros for tokens whose output is not finite."""
    return f_nH.masked_fill(~torch.isfinite(f_nH).all(dim=1, keepdim=True), 0.0)


def output_gram(
    outputs: Callable[[int, Tensor], Tensor],
    x_SH: Tensor,
    gate_SE: Tensor,
    target_SH: Tensor | None = None,
) -> OutputGram:
    """Run every expert on every token, a few tokens at a time.

    Args:
        outputs: an expert's outputs [n, H] for inputs [n, H].
        x_SH: inputs of the block.
        gate_SE: the gates with all experts, for the layer's own output.
        target_SH: what the layer should give; None takes its own output.
    """
    S, E = gate_SE.shape
    step = max(1, _OUTPUTS // (E * x_SH.shape[1]))
    grams, crosses, rests = [], [], []
    broken: set[int] = set()
    for start in range(0, S, step):
        x_nH = x_SH[start : start + step]
        f_nEH = torch.empty(len(x_nH), E, x_SH.shape[1], dtype=torch.float64)
        for expert in range(E):
            f_nH = outputs(expert, x_nH).double()
            if not bool(torch.isfinite(f_nH).all()):
                broken.add(expert)
                f_nH = finite_rows(f_nH)
            f_nEH[:, expert] = f_nH
        grams.append(f_nEH @ f_nEH.transpose(1, 2))
        if target_SH is not None:
            own_nH = (gate_SE[start : start + step, None] @ f_nEH)[:, 0]
            rest_nH = own_nH - target_SH[start : start + step].double()
            crosses.append((f_nEH @ rest_nH[..., None])[..., 0])
            rests.append(rest_nH.square().sum(dim=1))
    return OutputGram(
        torch.cat(grams),
        torch.cat(crosses) if crosses else None,
        torch.cat(rests) if rests else None,
        tuple(sorted(broken)),
    )


@dataclass(frozen=True)
class Reconstruction:
    """The error of one layer's output as a function of the experts that are left.

    Attributes:
        router: the layer's routing over subsets.
        gram: of the experts' outputs.
        norm: ``frobenius`` is the norm of the change over all tokens; ``token`` the sum over
            tokens of the norm of each one's change.
    """

    router: SubsetRouter
    gram: OutputGram
    norm: Norm = "frobenius"

    @property
    def experts(self) -> int:
        """E."""
        return int(self.gram.gram_SEE.shape[1])

    def output_norm(self) -> float:
        """The norm of the layer's own output over all tokens."""
        full_SE = self._full()
        square_S = ((full_SE[:, None] @ self.gram.gram_SEE)[:, 0] * full_SE).sum(dim=1)
        return float(square_S.sum().clamp(min=0.0).sqrt())

    def _full(self) -> Tensor:
        return self.router.gates(torch.ones(1, self.experts, dtype=torch.bool))[0]

    def losses(self, kept_NE: Tensor) -> Tensor:
        """The error [N], float64, of each subset (True: left)."""
        step = max(1, _GATES // (self.router.tokens * self.experts))
        parts = [kept_NE[i : i + step] for i in range(0, len(kept_NE), step)]
        before = torch.get_num_threads()
        # one core per part: products this small do not gain from several, which only wait for each
        # other; the numbers do not depend on how many there are
        torch.set_num_threads(1)
        try:
            full_SE = self._full()
            workers = min(before, len(parts))
            if workers < 2:
                return torch.cat([self._losses(part, full_SE) for part in parts])
            with ThreadPoolExecutor(
                workers, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                return torch.cat(list(pool.map(lambda part: self._losses(part, full_SE), parts)))
        finally:
            torch.set_num_threads(before)

    def _losses(self, kept_nE: Tensor, full_SE: Tensor) -> Tensor:
        change_SnE = (self.router.gates(kept_nE) - full_SE).transpose(0, 1)
        square_Sn = ((change_SnE @ self.gram.gram_SEE) * change_SnE).sum(dim=2)
        if self.gram.cross_SE is not None and self.gram.rest_S is not None:
            square_Sn += 2 * (change_SnE @ self.gram.cross_SE[..., None])[..., 0]
            square_Sn += self.gram.rest_S[:, None]
        square_Sn = square_Sn.clamp(min=0.0)  # rounding
        if self.norm == "token":
            return square_Sn.sqrt().sum(dim=0)
        return square_Sn.sum(dim=0).sqrt()
