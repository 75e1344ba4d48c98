"""What experts served: counted as by hand, merged in any order, bounded, and silent if unknown."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from moeprune.core.accumulating import BlockRows, Origin
from moeprune.core.served import Served
from moeprune.models import data

E, K, T = 5, 2, 200


def rows(seed: int, watched: list[int]) -> BlockRows:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    origin = Origin(draw(9, T), torch.tensor([70, 7, 700])[draw(3, T)], torch.tensor(watched))
    # ids from E on are slots without an expert
    return BlockRows(
        torch.zeros(T, 4), draw(E + 2, T, K), torch.ones(T, K), None, draw(9, T), origin
    )


def empty() -> Served:
    blank = torch.zeros(0, dtype=torch.int64)
    return Served(blank, blank.new_zeros(0, E), blank, blank.new_zeros(0, E).int())


def by_hand(batches: list[BlockRows]) -> tuple[Counter, Counter]:
    domains: Counter = Counter()
    tokens: Counter = Counter()
    for batch in batches:
        assert batch.origin is not None
        for t in range(T):
            for expert in batch.index_TK[t].tolist():
                if expert < E:
                    domains[int(batch.origin.domain_T[t]), expert] += 1
                    if batch.origin.token_T[t] in batch.origin.watched_M:
                        tokens[int(batch.origin.token_T[t]), expert] += 1
    return domains, tokens


def counted(keys: torch.Tensor, counts: torch.Tensor) -> Counter:
    return Counter(
        {(int(key), e): int(n) for key, row in zip(keys, counts, strict=True)
         for e, n in enumerate(row) if n}
    )  # fmt: skip


def test_counts_are_those_of_a_count_by_hand() -> None:
    batches = [rows(1, [0, 3, 8]), rows(2, [0, 3, 8]), rows(3, [])]
    total = empty()
    for batch in batches:
        total.add_block(batch)
    domains, tokens = by_hand(batches)
    assert counted(total.domain_D, total.count_DE) == domains
    assert counted(total.token_M, total.count_ME) == tokens
    assert total.domain_D.tolist() == [7, 70, 700] and total.token_M.tolist() == [0, 3, 8]


def test_parts_merge_in_any_order() -> None:
    parts = []
    for seed, watched in ((1, [0, 3]), (2, [3, 5]), (3, [1])):
        part = empty()
        part.add_block(rows(seed, watched))
        parts.append(part)
    one, two = empty(), empty()
    for part in parts:
        one.merge(part)
    for part in reversed(parts):
        two.merge(part)
    for (name, a), (_, b) in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(a, b), name
    assert one.token_M.tolist() == [0, 1, 3, 5]


def test_rows_of_unknown_origin_count_for_nobody() -> None:
    total = empty()
    total.add_block(replace(rows(1, [0]), origin=None))
    assert all(not len(tensor) for _, tensor in total.tensors())


def test_batches_say_which_domain_and_watch_the_most_frequent(monkeypatch) -> None:
    monkeypatch.setattr(data, "WATCHED", 2)
    one = data.Domain("one", torch.tensor([[5, 5, 9, 1]]), 1.0)
    two = data.Domain("two", torch.tensor([[9, 9, 2, 5], [5, 2, 2, 9]]), 1.0)
    [batch] = data.batches([one, two])
    keys = [data.domain_key(name) for name in ("one", "two", "two")]
    assert batch.domain_B.tolist() == keys and len(set(keys)) == 2
    assert batch.watched_M.tolist() == [5, 9]
