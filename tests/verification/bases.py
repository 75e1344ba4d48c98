"""Clean checkpoints of every kind, and the tools to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import save_tiny
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import INDEX, Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import CHECKSUMS, PROVENANCE, apply_plan
from support import generator, plan_for, some_experts, without

Base = Callable[[str], Path]
Tensors = dict[str, Tensor]


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    data = json.loads(file.read_bytes())
    change(data)
    file.write_text(json.dumps(data))


def edit_config(**entries: Any) -> Callable[[Path], None]:
    """Sets entries of config.json; None removes one."""

    def change(directory: Path) -> None:
        def put(config: dict[str, Any]) -> None:
            for key, value in entries.items():
                config.pop(key, None)
                if value is not None:
                    config[key] = value

        edit_json(directory / "config.json", put)

    return change


def edit_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    """Changes the tensors of a checkpoint; its index stays right."""

    def edit(directory: Path) -> None:
        where: dict[str, str] = {}
        tensors: Tensors = {}
        files = sorted(file.name for file in directory.glob("*.safetensors"))
        for name in files:
            loaded = {key: tensor.clone() for key, tensor in load_file(directory / name).items()}
            tensors |= loaded
            where |= dict.fromkeys(loaded, name)
        change(tensors)
        shards: dict[str, Tensors] = {name: {} for name in files}
        for key, tensor in tensors.items():
            shards[where.get(key, files[0])][key] = tensor.contiguous()
        for name, shard in shards.items():
            (directory / name).unlink()
            if shard:
                save_file(shard, directory / name, metadata={"format": "pt"})
        if (directory / PROVENANCE).is_file():  # the change is meant, not a bit that fell over
            edit_json(directory / PROVENANCE, lambda data: data.pop(CHECKSUMS, None))
        if (directory / INDEX).is_file():
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                "weight_map": {key: name for name, shard in shards.items() for key in shard},
            }
            (directory / INDEX).write_text(json.dumps(index))

    return edit


def in_order(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Several changes."""

    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


# --- results of our own


def shapes_of(directory: Path | str) -> list[LayerShape]:
    """The MoE layers of a checkpoint."""
    return [site.shape for site in LayeredModel(Checkpoint.open(directory)).sites.values()]


def deleted(shape: LayerShape) -> LayerPlan:
    """Six experts stay."""
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, 6 // shape.groups))


def replaced(shape: LayerShape) -> LayerPlan:
    """Six experts stay, two become constants."""
    keep = some_experts(shape, 6 // shape.groups)
    gone = without(shape, keep)
    vectors = torch.randn(len(gone), shape.hidden, generator=generator(7, shape.layer))
    return LayerPlan(shape.layer, shape.experts, keep, gone, novices_NH=vectors)


def masked(shape: LayerShape) -> LayerPlan:
    """Half of every row is zero."""
    everyone = tuple(range(shape.experts))
    return LayerPlan(shape.layer, shape.experts, everyone, mask=MaskEdit(0.5, None, shape.roles))


def masked_2_of_4(shape: LayerShape) -> LayerPlan:
    """Two of every four weights of seven experts are zero; the first expert is deleted."""
    keep = tuple(range(1, shape.experts))
    return LayerPlan(shape.layer, shape.experts, keep, mask=MaskEdit(None, (2, 4), shape.roles))


def uneven(shape: LayerShape) -> LayerPlan:
    """Six or four experts stay, by turns."""
    count = 6 - 2 * (shape.layer % 2)
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, count // shape.groups))


def uneven_masked(shape: LayerShape) -> LayerPlan:
    """Both."""
    return replace(uneven(shape), mask=MaskEdit(0.5, None, shape.roles))


def applied(
    source: Path | str, out: Path, edit: Callable[[LayerShape], LayerPlan], pad: bool = False
) -> Path:
    """The checkpoint that the same edit of every layer gives."""
    checkpoint = Checkpoint.open(source)
    plan = plan_for(checkpoint, [edit(shape) for shape in shapes_of(source)])
    apply_plan(checkpoint, plan, out, writing=Writing(pad))
    return out


# --- quantised checkpoints and prediction heads, as vendors store them


def save_fp8(directory: Path) -> Path:
    """Matrices of the experts in 8 bits, with a scale per block of 16 x 16."""
    save_tiny("qwen3_moe", directory)

    def quantise(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".experts." in key]:
            weight = tensors[key]
            blocks = (-(-weight.shape[0] // 16), -(-weight.shape[1] // 16))
            scale = float(weight.abs().max()) / 448
            tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.full(blocks, scale)

    edit_tensors(quantise)(directory)
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    edit_config(quantization_config=entry)(directory)
    return directory


def save_mxfp4(directory: Path) -> Path:
    """Matrices of the experts in blocks of 32 values of 4 bits."""
    save_tiny("gpt_oss", directory, hidden_size=64, intermediate_size=64)

    def quantise(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            E, inputs, outputs = tensors.pop(key).shape
            shape = (E, outputs, inputs // 32)
            tensors[f"{key}_blocks"] = torch.randint(
                0, 256, (*shape, 16), dtype=torch.uint8, generator=generator(3)
            )
            tensors[f"{key}_scales"] = torch.full(shape, 124, dtype=torch.uint8)

    edit_tensors(quantise)(directory)
    edit_config(quantization_config={"quant_method": "mxfp4"})(directory)
    return directory


def save_with_head(directory: Path) -> Path:
    """A prediction head behind the four layers, with experts of its own."""
    save_tiny("deepseek_v3", directory)

    def attach(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.3.")]:
            tensors[key.replace("layers.3.", "layers.4.")] = tensors[key].clone()

    edit_tensors(attach)(directory)
    return directory


def save_without_head(directory: Path) -> Path:
    """As transformers saves it, with a configuration that promises no prediction head."""
    save_tiny("deepseek_v3", directory)
    edit_config(num_nextn_predict_layers=0)(directory)
    return directory
