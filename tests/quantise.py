"""Quantised twins of tiny checkpoints, written the way vendors store them.

The arithmetic is written down again here, block by block, and shares nothing with the package.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = re.compile(
    r".*(experts\.\d+\.\w+|(self_attn|attention|mlp|shared_experts?|feed_forward)\.\w*proj\w*)\.weight"
)
"""What block-scaled checkpoints quantise: matrices of experts, attention and dense layers."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Tensors = dict[str, Tensor]


def load_tensors(directory: Path) -> Tensors:
    """All tensors of a checkpoint."""
    found: Tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def write(source: Path, out: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    """``source`` with other tensors in two files, and another ``quantization_config``."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    names = sorted(tensors)
    for part in range(2):  # a weight and its scales may stand in different files
        chosen = {name: tensors[name].contiguous() for name in names[part::2]}
        save_file(chosen, out / f"model-{part + 1}.safetensors", metadata={"format": "pt"})
    where = {name: f"model-{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


def fp8_blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``weight`` [..., rows, columns] in fp8, and one float32 scale per block."""
    height, width = block
    rows, columns = weight.shape[-2:]
    scale = weight.new_zeros(*weight.shape[:-2], -(-rows // height), -(-columns // width))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            at = (..., slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scale[..., i, j] = weight[at].abs().amax(dim=(-1, -2)) / 448
            stored[at] = (weight[at] / scale[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return stored, scale


def fp8_values(stored: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """What ``fp8_blocks`` stands for, float32."""
    found = stored.float()
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            height, width = block
            at = (..., slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            found[at] *= scale[..., i, j, None, None]
    return found


def fp8(
    source: Path,
    out: Path,
    block: tuple[int, int] = (8, 8),
    chosen: Callable[[str], object] = LINEAR.fullmatch,
    skip: Sequence[str] = ("lm_head",),
    extra: Callable[[str], Tensors] = lambda name: {},
    **config: Any,
) -> Path:
    """A block-scaled twin: ``weight`` as F8_E4M3 beside ``weight_scale_inv``.

    ``extra`` gives more tensors to stand beside a quantised weight, by the name without ``weight``.
    """
    tensors: Tensors = {}
    for name, tensor in load_tensors(source).items():
        tensors[name] = tensor
        if tensor.ndim >= 2 and chosen(name):
            tensors[name], tensors[name + "_scale_inv"] = fp8_blocks(tensor.float(), block)
            tensors |= extra(name.removesuffix("weight"))
    described = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": list(skip),
    }
    return write(source, out, tensors, described | config)


def mxfp4_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` [..., columns] as nibbles [..., columns / 32, 16] and one exponent per 32."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(dim=-1) / 6).log2().ceil().clamp(-127, 127)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    code = ((groups / exponent.exp2()[..., None])[..., None] - table).abs().argmin(dim=-1)
    packed = code[..., 0::2] | code[..., 1::2] << 4
    return packed.to(torch.uint8), (exponent + 127).to(torch.uint8)


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """What ``mxfp4_blocks`` stands for, float32 [..., columns]."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    code = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    return (table[code.long()] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2)


def mxfp4(source: Path, out: Path) -> Path:
    """A twin of a gpt_oss checkpoint: ``*_blocks`` and ``*_scales`` in place of the experts."""
    tensors: Tensors = {}
    for name, tensor in load_tensors(source).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed, exponent = mxfp4_blocks(tensor.transpose(1, 2))
            tensors[name + "_blocks"], tensors[name + "_scales"] = packed, exponent
        else:
            tensors[name] = tensor
    skip = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    return write(source, out, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skip})


def plain(quantised: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The unquantised twin of what ``fp8`` or ``mxfp4`` wrote: other tensors as they are."""
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    stored, tensors = load_tensors(quantised), {}
    for name, tensor in stored.items():
        if name + "_scale_inv" in stored:
            scale, block = stored[name + "_scale_inv"].float(), config["weight_block_size"]
            tensors[name] = fp8_values(tensor, scale, tuple(block)).to(dtype)
        elif name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            tensors[stem] = mxfp4_values(tensor, stored[stem + "_scales"]).transpose(1, 2).to(dtype)
        elif not name.endswith(("_scale_inv", "_scales", "activation_scale", "input_scale")):
            tensors[name] = tensor
    return write(quantised, out, tensors, None)
