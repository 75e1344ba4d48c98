"""What each expert served: which domains of the text, and which tokens.

Legend of the axes: T tokens, K selected per token, E experts, D domains, M watched tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.core.accumulating import Accumulator, BlockRows, zeros
from moeprune.core.shapes import LayerShape

WATCHED = 4096
"""Tokens that are counted one by one: the most frequent ones of the text. Bounds the sums."""


@dataclass
class Served(Accumulator):
    """Routed slots by domain and by token.

    count_DE of domain d and expert e, domain_D the keys of the domains; count_ME of token m and
    expert e, token_M the ids of the watched tokens. Both keys ascend. Sums over other text merge
    by key, so domains and tokens that only one of them knows are kept.
    """

    name: ClassVar[str] = "served"
    sampled: ClassVar[bool] = True
    domain_D: Tensor
    count_DE: Tensor
    token_M: Tensor
    count_ME: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Served:
        """Sums over no tokens."""
        E = shape.experts
        return cls(
            zeros(0, device=device, dtype=torch.int64),
            zeros(0, E, device=device, dtype=torch.int64),
            zeros(0, device=device, dtype=torch.int64),
            zeros(0, E, device=device, dtype=torch.int32),
        )

    def add_block(self, rows: BlockRows) -> None:
        """Add one batch; nothing where it is not known what its rows are."""
        origin = rows.origin
        if origin is None:
            return
        E = self.count_DE.shape[1]
        index_TK = rows.index_TK.clamp(max=E)  # slots without an expert go to an extra class
        domain_D, row_T = torch.unique(origin.domain_T, return_inverse=True)
        by_domain_DE = _counts(row_T, index_TK, len(domain_D), E)
        # only the tokens of this batch: the whole list would be zeros for the most part
        token_M = torch.unique(origin.token_T)
        token_M = token_M[torch.isin(token_M, origin.watched_M)]
        row_T = torch.searchsorted(token_M, origin.token_T)
        row_T = row_T.clamp(max=max(0, len(token_M) - 1))
        known_T = (
            token_M[row_T] == origin.token_T
            if len(token_M)
            else torch.zeros_like(origin.token_T, dtype=torch.bool)
        )
        by_token_ME = _counts(row_T[known_T], index_TK[known_T], len(token_M), E)
        self.merge(Served(domain_D, by_domain_DE, token_M, by_token_ME.to(torch.int32)))

    def merge(self, other: Accumulator) -> None:
        """Add the sums of ``other``, key by key."""
        assert isinstance(other, Served)
        self.domain_D, self.count_DE = _merged(
            (self.domain_D, self.count_DE), (other.domain_D, other.count_DE)
        )
        self.token_M, self.count_ME = _merged(
            (self.token_M, self.count_ME), (other.token_M, other.count_ME)
        )


def _counts(row_T: Tensor, index_TK: Tensor, rows: int, experts: int) -> Tensor:
    """Slots by row and expert, [rows, E]."""
    flat = (row_T[:, None] * (experts + 1) + index_TK).reshape(-1)
    counts = torch.bincount(flat, minlength=rows * (experts + 1))
    return counts.view(rows, experts + 1)[:, :experts]


def _merged(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (key_a, count_aE), (key_b, count_bE) = one, two
    if torch.equal(key_a, key_b):
        return key_a, count_aE + count_bE
    key_n = torch.unique(torch.cat((key_a, key_b)))
    count_nE = count_aE.new_zeros(len(key_n), count_aE.shape[1])
    count_nE.index_add_(0, torch.searchsorted(key_n, key_a), count_aE)
    count_nE.index_add_(0, torch.searchsorted(key_n, key_b), count_bE)
    return key_n, count_nE
