"""Differences between the outputs of paired experts, measured inside the student's forward.

An experts implementation, registered with transformers' ``ExpertsInterface``, computes the experts
one by one with gradients and compares each output, before the gate, with the teacher's. Axes: E
experts, T tokens, n tokens of one expert, K selected, H width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from moeprune.errors import UnsupportedModelError
from moeprune.models.observe import run_expert
from moeprune.models.sites import MoESite
from moeprune.models.special import expert_sizes
from moeprune.recovery.pairing import Groups

IMPLEMENTATION = "moeprune_distil"
_ATTRIBUTE = "moeprune_distil"
_OTHER_CALLS = ("DbrxExperts", "Llama4TextExperts", "LongcatFlashExperts", "ZayaExperts")


@dataclass
class Pair:
    """One layer's experts and their teachers.

    Attributes:
        teacher: the teacher's experts module.
        groups: for each expert of the student, those of the teacher with their shares.
        stream: whether the teacher's own inputs are compared.
        seen: input [T, H] and choice [T, K] of the teacher, in stream mode.
        error_E: of the last forward, the sum over tokens of the mean squared difference.
        count_E: of the last forward, the tokens that were compared.
    """

    teacher: Any
    groups: tuple[Mapping[int, float], ...]
    stream: bool
    seen: tuple[Tensor, Tensor] | None = None
    error_E: list[Tensor | None] = field(default_factory=list)
    count_E: list[int] = field(default_factory=list)

    def begin(self, experts: int) -> None:
        """A new forward."""
        self.error_E, self.count_E = [None] * experts, [0] * experts

    def compare(self, expert: int, tokens_n: Tensor, x_nH: Tensor, f_nH: Tensor) -> None:
        """Add what one expert of the student made of its tokens."""
        group = self.groups[expert]
        if not group:
            return
        if self.stream:
            assert self.seen is not None, "the teacher runs first"
            both_n = _any_of(self.seen[1][tokens_n], group)
            tokens_n, f_nH = tokens_n[both_n], f_nH[both_n]
            x_nH = self.seen[0][tokens_n]
        if not len(tokens_n):
            return
        with torch.no_grad():
            x_nH = x_nH.detach().to(next(self.teacher.parameters()).dtype)
            target_nH = torch.stack(
                [share * run_expert(self.teacher, e, x_nH)[1].float() for e, share in group.items()]
            ).sum(dim=0)
        gap_nH = f_nH.float() - target_nH
        self.error_E[expert] = gap_nH.square().mean(dim=-1).sum()
        self.count_E[expert] = len(tokens_n)


def _any_of(index_nK: Tensor, group: Iterable[int]) -> Tensor:
    chosen_n = torch.zeros(len(index_nK), dtype=torch.bool, device=index_nK.device)
    for expert in group:
        chosen_n |= (index_nK == expert).any(dim=1)
    return chosen_n


class ExpertPairs:
    """Switches a student to the comparing experts, and reads what they found.

    Args:
        students: the student's MoE blocks by layer.
        teachers: the teacher's.
        groups: which belong together.
        target: ``local`` or ``stream``.

    Raises:
        UnsupportedModelError: the family's experts are not called as transformers' interface says.
    """

    def __init__(
        self,
        students: Mapping[int, MoESite],
        teachers: Mapping[int, MoESite],
        groups: Groups,
        target: str,
    ) -> None:
        self._pairs: dict[int, Pair] = {}
        self._stack = ExitStack()
        for layer, site in sorted(students.items()):
            experts: Any = site.experts
            kinds = {cls.__name__ for cls in type(experts).__mro__}
            if kinds.intersection(_OTHER_CALLS):
                raise UnsupportedModelError(
                    f"{type(experts).__name__}: experts that cannot be compared one by one",
                    "use --how logit-kd",
                )
            pair = Pair(teachers[layer].experts, groups[layer], target == "stream")
            self._pairs[layer] = pair
            experts.__dict__[_ATTRIBUTE] = pair
            experts.config._experts_implementation = IMPLEMENTATION
            if pair.stream:
                hook = teachers[layer].experts.register_forward_pre_hook(
                    _keeper(pair), with_kwargs=True
                )
                self._stack.callback(hook.remove)

    def close(self) -> None:
        """Let go of the teacher."""
        self._stack.close()
        for pair in self._pairs.values():
            pair.seen = None

    def found(self) -> tuple[Tensor, Tensor]:
        """Sums of errors and counts of the last forward, over all layers one behind the other."""
        error, count = [], []
        for pair in self._pairs.values():
            some = next((e for e in pair.error_E if e is not None), None)
            zero = torch.zeros((), device=None if some is None else some.device)
            error += [zero if e is None else e for e in pair.error_E]
            count += pair.count_E
        stacked = torch.stack(error)
        return stacked, torch.tensor(count, dtype=torch.float32, device=stacked.device)


def _keeper(pair: Pair) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_TH = args[0] if args else kwargs["hidden_states"]
        index_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
        pair.seen = (x_TH.detach().reshape(-1, x_TH.shape[-1]), index_TK)

    return keep


class _Apart:
    """An experts module whose parameters are taken apart into experts once.

    The gradient of a slice is as large as what it was cut from: one slice per expert would fill
    and add E tensors of E experts each. That of ``unbind`` is the slices' one behind the other.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._whole = experts
        for name, p in experts.named_parameters(recurse=False):
            if p.dim():
                self.__dict__[name] = p.unbind()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def compared_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward, expert by expert, with gradients; ids from E on are nobody's."""
    pair: Pair = self.__dict__[_ATTRIBUTE]
    T, K = top_k_index.shape
    E = expert_sizes(self)[0]
    flat_S = top_k_index.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts = torch.bincount(flat_S, minlength=E)[:E].tolist()
    gates_S = top_k_weights.reshape(-1)
    pair.begin(E)
    parts = []
    start = 0
    experts = _Apart(self)
    for expert, n in enumerate(counts):
        if not n:
            continue
        slots_n = order_S[start : start + n]
        start += n
        tokens_n = slots_n // K
        x_nH = hidden_states[tokens_n]
        f_nH = run_expert(experts, expert, x_nH)[1]
        pair.compare(expert, tokens_n, x_nH, f_nH)
        parts.append((f_nH * gates_S[slots_n, None]).to(hidden_states.dtype))
    parts.append(hidden_states.new_zeros(T * K - start, hidden_states.shape[1]))
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(T * K, device=order_S.device)
    return torch.cat(parts)[place_S].view(T, K, -1).sum(dim=1)


ExpertsInterface.register(IMPLEMENTATION, compared_experts)
