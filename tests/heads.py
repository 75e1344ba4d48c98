"""Checkpoints with attached prediction layers, named as their vendors name them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune.models.checkpoint import INDEX

HEADS = {
    "deepseek_v3": "model.layers.4.",
    "glm4_moe": "model.layers.4.",
    "qwen3_next": "mtp.layers.0.",
    "hy_v3": "model.layers.4.",
    "granitemoe": "mtp.layers.0.",
    "gemma4_text": "model.mtp.layers.0.",
}
"""Families of the registry of tiny models, and where their head's layer is put."""

LAST = "model.layers.3."
"""The tiny models' last layer: the head's layer has tensors of the same names and sizes."""

_FUSION = {  # what joins the last hidden state and the next token's embedding, and the norms
    "model.layers.4.": {
        "model.layers.4.eh_proj.weight": (32, 64),
        "model.layers.4.enorm.weight": (32,),
        "model.layers.4.hnorm.weight": (32,),
        "model.layers.4.shared_head.norm.weight": (32,),
        "model.layers.4.shared_head.head.weight": (128, 32),
        "model.layers.4.embed_tokens.weight": (128, 32),
    },
    "mtp.layers.0.": {
        "mtp.fc.weight": (32, 64),
        "mtp.norm.weight": (32,),
        "mtp.pre_fc_norm_embedding.weight": (32,),
        "mtp.pre_fc_norm_hidden.weight": (32,),
    },
    "model.mtp.layers.0.": {
        "model.mtp.layers.0.eh_proj.weight": (32, 64),
        "model.mtp.layers.0.token_layernorm.weight": (32,),
    },
}


def read_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return found


def head_of(source: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors of a head: none equals that of the layer whose names and sizes it has."""
    random = torch.Generator().manual_seed(11)
    head = {
        prefix + name.removeprefix(LAST): 0.15 * torch.randn(tensor.shape, generator=random)
        for name, tensor in read_all(source).items()
        if name.startswith(LAST)
    }
    for name, shape in _FUSION[prefix].items():
        head[name] = 0.15 * torch.randn(shape, generator=random)
    return head


def attach(source: Path, directory: Path, head: dict[str, Tensor]) -> Path:
    """A copy of ``source`` with the tensors ``head`` in a shard of their own."""
    shutil.copytree(source, directory)
    save_file({name: t.clone() for name, t in head.items()}, directory / "zz-head.safetensors")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update(dict.fromkeys(head, "zz-head.safetensors"))
    (directory / INDEX).write_text(json.dumps(index))
    return directory
