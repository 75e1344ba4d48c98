"""What the vLLM plugin makes of a checkpoint's files, against the modules that transformers makes.

vLLM's loader and kernel have transformers' experts in their places here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from special import write_special

import moeprune
from families import experts_modules, save_tiny
from moeprune.serving.slots import Slots, added_output, index_tensors
from support import layer_of, matrices

E, K, T = 8, 3, 40
ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up"}


def routed(hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(T, E, generator=random).argsort(1)[:, :K]
    gate_TK = torch.rand(T, K, generator=random)
    return torch.randn(T, hidden, generator=random), ids_TK, gate_TK


@pytest.mark.parametrize("kind", ["novices", "maps", "answers"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe"])  # the last one is fused
def test_files_as_in_transformers(tmp_path: Path, family: str, kind: str) -> None:
    out = write_special(save_tiny(family, tmp_path / "whole"), kind, tmp_path / "out")
    model = moeprune.load(out)
    files = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    for name, module in experts_modules(model).items():
        experts: Any = module
        slots = Slots.of(model.config, layer_of(name), E)
        assert slots is not None
        value_RW = torch.full(
            (len(slots.added), model.config.hidden_size * (1 + 2 * slots.rank)), torch.nan
        )
        matched = set()
        for file_name, tensor in files.items():
            rest = file_name.partition(".experts.")[2]
            if not rest or layer_of(file_name) != layer_of(name):
                continue
            row = slots.row(rest)
            if row is not None:
                value_RW[row] = tensor
                continue
            slot, role, _ = slots.stored_name(rest).split(".")
            matched.add((int(slot), role))
            torch.testing.assert_close(
                tensor, matrices(experts, int(slot))[ROLES.get(role, "down")], rtol=0, atol=0
            )
        fused = family == "granitemoe"
        assert len(matched) == (0 if fused else 3 * len(slots.kept)) and len(slots.kept) < E
        assert len(experts.down_proj) == len(slots.kept)
        x_TH, ids_TK, gate_TK = routed(model.config.hidden_size)
        slot_E, row_E, computed_E = index_tensors(slots)
        native = type(experts).__mro__[2]
        with torch.no_grad():
            out_TH = native.forward(experts, x_TH, slot_E[ids_TK], gate_TK * computed_E[ids_TK])
            out_TH += added_output(x_TH, row_E[ids_TK], gate_TK, value_RW, slots.rank)
            torch.testing.assert_close(out_TH, experts(x_TH, ids_TK, gate_TK), rtol=1e-5, atol=1e-5)
