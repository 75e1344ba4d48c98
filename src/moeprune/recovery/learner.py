"""Student and teacher on the same tokens: the parts of the loss. B sequences, L tokens, V words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeprune.recovery.experts import ExpertPairs


class Learner(nn.Module):
    """Computes what a step needs; the teacher's weights are not among its parameters.

    Args:
        student: the model that trains.
        teacher: a frozen model; None if nothing is compared.
        pairs: paired experts, of ``expert-kd``.
        teach_steps: whether training needs the teacher's logits or its own inputs of experts.
        bfloat16: compute in bfloat16 where autocast does.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        pairs: ExpertPairs | None,
        teach_steps: bool,
        bfloat16: bool,
    ) -> None:
        super().__init__()
        self.student = student
        self._aside = (teacher, pairs)  # in a tuple, no submodule
        self._teach_steps = teach_steps
        self._bfloat16 = bfloat16

    def forward(self, ids_BL: Tensor, teach: bool | None = None) -> dict[str, Tensor]:
        """``ce`` and, as far as they are known, ``kl``, ``error`` and ``count`` of experts.

        ``ce`` and ``kl`` are means over predicted tokens, in nats; ``error`` and ``count`` are
        those of ``ExpertPairs.found``.
        """
        teacher, pairs = self._aside
        teach = self._teach_steps if teach is None else teach
        with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=self._bfloat16):
            logp_BLV = None
            if teacher is not None and teach:
                with torch.no_grad():
                    logp_BLV = _log_probabilities(teacher, ids_BL)
            mine_BLV = _log_probabilities(self.student, ids_BL)
        picked = mine_BLV.gather(-1, ids_BL[:, 1:, None])
        found = {"ce": -picked.mean()}
        if logp_BLV is not None:
            gap_BLV = logp_BLV.exp() * (logp_BLV - mine_BLV)
            found["kl"] = gap_BLV.sum(dim=-1).mean()
        if pairs is not None:
            found["error"], found["count"] = pairs.found()
        return found


def _log_probabilities(model: Any, ids_BL: Tensor) -> Tensor:
    """Of every token but the first."""
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits_BLV, dim=-1)


class Noise:
    """NEFTune (arXiv 2310.05914): uniform noise on the embeddings while the model trains.

    Its size is ``alpha / sqrt(L * H)`` for sequences of L tokens and vectors of H numbers.
    """

    def __init__(self, embeddings: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        embeddings.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: Any, output_BLH: Tensor) -> Tensor:
        if not module.training:
            return output_BLH
        size = self._alpha / (output_BLH.shape[-2] * output_BLH.shape[-1]) ** 0.5
        return output_BLH + torch.empty_like(output_BLH).uniform_(-size, size)
