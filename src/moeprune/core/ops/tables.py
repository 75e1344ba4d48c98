"""Tables that choose experts by token id, after some of the experts are gone.

Where a layer routes by such a table (the hash layers of DeepSeek-V4), no router score decides, so
a deleted expert leaves holes that a rule has to fill.

Axis letters: V token ids, K experts per token, E experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def redirect_table(table_VK: Tensor, keep: Sequence[int], experts: int) -> Tensor:
    """The table over the experts ``keep``, which are numbered 0, 1, ... in that order.

    Entries of kept experts are renumbered and stay where they are. Every other entry, row by row
    and from left to right, goes to the kept expert that is not in its row yet and has the fewest
    entries: all that kept experts had from the start, and the redirected ones so far. Of equals,
    the lowest id. So the load that the deleted experts leave is spread evenly, rows of different
    ids stay rows of different ids, and the result depends on nothing but the arguments.

    Args:
        table_VK: expert ids, of any integer dtype.
        keep: ascending ids of the experts that stay, at least K.
        experts: E.

    Returns:
        A new table of the same shape and dtype, entries in 0..len(keep)-1.

    Raises:
        ValueError: an entry is no expert, or fewer than K experts stay.
    """
    ids_VK = table_VK.long()
    if ids_VK.numel() and not 0 <= int(ids_VK.min()) <= int(ids_VK.max()) < experts:
        raise ValueError(f"the table names an expert outside 0..{experts - 1}")
    if len(keep) < ids_VK.shape[1]:
        raise ValueError(f"{len(keep)} experts remain for rows of {ids_VK.shape[1]}")
    number_E = torch.full((experts,), -1)
    number_E[list(keep)] = torch.arange(len(keep))
    new_VK = number_E[ids_VK]
    used = torch.bincount(new_VK[new_VK >= 0], minlength=len(keep)).tolist()
    least = [(count, expert) for expert, count in enumerate(used)]
    heapq.heapify(least)
    broken = (new_VK < 0).any(dim=1).nonzero().reshape(-1)
    rows = new_VK[broken].tolist()
    for row in rows:
        for slot, expert in enumerate(row):
            if expert < 0:
                row[slot] = _take(least, row)
    if rows:
        new_VK[broken] = torch.tensor(rows)
    return new_VK.to(table_VK.dtype)


def _take(least: list[tuple[int, int]], row: Sequence[int]) -> int:
    """The first expert of the heap that is not in ``row``; it then has one entry more."""
    passed = []
    while least[0][1] in row:
        passed.append(heapq.heappop(least))
    count, expert = least[0]
    heapq.heapreplace(least, (count + 1, expert))
    for item in passed:
        heapq.heappush(least, item)
    return expert
