"""What several tests need: plans for a checkpoint, and slow but obvious references to compare with.

The references know nothing of the package under test: they find experts and routers in the loaded
transformers model on their own, and change what it computes from outside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import experts_modules, token_ids
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import Checkpoint

DROPPED_LOGIT = -1e30


def plan_for(checkpoint: Checkpoint, layers: Sequence[LayerPlan]) -> Plan:
    """A plan that fits the fingerprint of ``checkpoint``."""
    return Plan(
        layers={layer.layer: layer for layer in layers},
        method="test",
        options={},
        budget={},
        model={"name": checkpoint.path.name, "fingerprint": checkpoint.fingerprint},
        statistics={},
        seed=0,
    )


def generator(*seed: int) -> torch.Generator:
    """A random generator that depends on all of ``seed``."""
    return torch.Generator().manual_seed(hash(seed))


def some_experts(shape: LayerShape, per_group: int, seed: int = 0) -> tuple[int, ...]:
    """``per_group`` experts of every routing group, others in every layer, ascending."""
    size = shape.experts // shape.groups
    shuffled = (
        torch.randperm(size, generator=generator(seed, shape.layer, group)) + group * size
        for group in range(shape.groups)
    )
    return tuple(sorted(int(e) for ids in shuffled for e in ids[:per_group]))


def without(shape: LayerShape, dropped: Sequence[int]) -> tuple[int, ...]:
    """The experts of a layer that are not in ``dropped``."""
    return tuple(e for e in range(shape.experts) if e not in dropped)


def open_stock(directory: Path, **options: Any) -> PreTrainedModel:
    """Open with transformers alone; nothing may be missing, left over or of another size.

    Weights are copied to aligned addresses, see ``families.load_tiny``.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return aligned(model)


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights to aligned addresses, as ``families.load_tiny`` does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def logits(model: PreTrainedModel, tokens: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """Logits of a forward without cache."""
    with torch.no_grad():
        tokens = token_ids(2, 24) if tokens is None else tokens
        output: Tensor = model(tokens, use_cache=False, **inputs).logits
        return output


def tensor_digests(directory: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and hash of the bytes of every tensor of a checkpoint."""
    found = {}
    for name, info in Checkpoint.open(directory).tensors.items():
        with info.file.open("rb") as handle:
            handle.seek(info.begin)
            data = handle.read(info.nbytes)
        found[name] = (info.dtype, info.shape, hashlib.sha256(data).hexdigest())
    return found


def tree(directory: Path) -> dict[str, str]:
    """Everything below a directory with hashes of the files: to show that nothing changed."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        )
        for path in sorted(directory.rglob("*"))
    }


def layer_of(name: str) -> int:
    """The decoder layer in a module's name."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


def router_of(model: nn.Module, experts_name: str) -> nn.Module:
    """The router beside an experts module."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    return block.gate if hasattr(block, "gate") else block.router


class _DropRows(TorchFunctionMode):
    """Sets the logits of dropped experts to almost minus infinity where a router computes them.

    The other logits come from a product with the remaining rows only: matrix kernels may round a
    row differently when the number of rows is another.
    """

    def __init__(self, remaining: Mapping[int, list[int]]) -> None:
        super().__init__()
        self.remaining = remaining
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not nn.functional.linear or args[1].data_ptr() not in self.remaining:
            return func(*args, **(kwargs or {}))
        x, weight, *rest = args
        bias = rest[0] if rest else (kwargs or {}).get("bias")
        self.seen.add(weight.data_ptr())
        rows = self.remaining[weight.data_ptr()]
        output = x.new_full((*x.shape[:-1], len(weight)), DROPPED_LOGIT)
        output[..., rows] = func(x, weight[rows], None if bias is None else bias[rows])
        return output


def expert_count(experts: Any) -> int:
    """E of an experts module of any family."""
    if hasattr(experts, "down_proj"):
        return int(experts.down_proj.shape[0])
    return int(experts.num_experts)  # dbrx: one matrix for all


def matrices(experts: Any, expert: int) -> dict[str, Tensor]:
    """The matrices of one loaded expert as [outputs, inputs], by transformers' own flags."""
    if hasattr(experts, "mlp"):  # dbrx
        size = experts.ffn_hidden_size
        flat = {"gate": experts.mlp.w1, "up": experts.mlp.v1, "down": experts.mlp.w2}
        found = {role: w[expert * size : (expert + 1) * size] for role, w in flat.items()}
        return {**found, "down": found["down"].T}
    flags = {"has_gate": True, "is_concatenated": True}
    flags["is_transposed"] = type(experts).__name__ == "Llama4TextExperts"
    flags = {name: getattr(experts, name, value) for name, value in flags.items()}
    down = experts.down_proj[expert]
    if not flags["has_gate"]:
        return {"up": experts.up_proj[expert], "down": down}
    gate_up = experts.gate_up_proj[expert]
    if flags["is_transposed"]:
        gate_up, down = gate_up.T, down.T
    half = len(gate_up) // 2
    gate, up = (
        (gate_up[:half], gate_up[half:])
        if flags["is_concatenated"]
        else (gate_up[0::2], gate_up[1::2])
    )
    return {"gate": gate, "up": up, "down": down}


def redirected(table: Sequence[Sequence[int]], keep: Sequence[int]) -> list[list[int]]:
    """Rows of expert ids in which no deleted one is left; kept ones have their old ids here."""
    rows = [list(row) for row in table]
    used = {expert: sum(row.count(expert) for row in rows) for expert in keep}
    for row in rows:
        for slot, expert in enumerate(row):
            if expert not in keep:
                row[slot] = min((e for e in keep if e not in row), key=lambda e: (used[e], e))
                used[row[slot]] += 1
    return rows


def per_expert_tensors(model: nn.Module, experts_name: str) -> list[tuple[str, Tensor]]:
    """Biases and matrices of a router, and of the block around it, that have a row per expert."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    router = router_of(model, experts_name)
    total = expert_count(model.get_submodule(experts_name))
    tensors = [*router.named_parameters(), *router.named_buffers()]
    if type(router).__name__ == "ZayaRouter":  # a network: only what comes last knows experts
        return [(n, t) for n, t in tensors if n.endswith(("out_proj.weight", "balancing_biases"))]
    tensors += [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return [(n, t) for n, t in tensors if "bias" in n or (t.ndim == 2 and len(t) >= total)]


@contextmanager
def experts_masked(model: PreTrainedModel, keep: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """The unpruned ``model`` whose routers never choose an expert that is not in ``keep``.

    Every matrix of the router with one row per expert makes logits, of which those of dropped
    experts become almost minus infinity; dropped experts' entries of every other bias of the router
    or the block around it become minus infinity. A table that chooses by token id is redirected.
    """
    rows: dict[int, list[int]] = {}
    saved: list[tuple[Tensor, Tensor]] = []
    for name, experts in experts_modules(model).items():
        if layer_of(name) not in keep:
            continue
        dropped = [e for e in range(expert_count(experts)) if e not in keep[layer_of(name)]]
        for key, tensor in per_expert_tensors(model, name):
            if "bias" in key:
                saved.append((tensor, tensor.data.clone()))
                tensor.data[..., dropped] = -torch.inf
            elif "tid2eid" in key:
                saved.append((tensor, tensor.data.clone()))
                table = redirected(tensor.tolist(), keep[layer_of(name)])
                tensor.data.copy_(torch.tensor(table))
            else:
                rows[tensor.data_ptr()] = [e for e in range(len(tensor)) if e not in dropped]
    mode = _DropRows(rows)
    try:
        with mode:
            yield
    finally:
        for tensor, before in saved:
            tensor.data.copy_(before)
    assert mode.seen == set(rows), "a router did not compute its logits as this reference expects"


@contextmanager
def outputs_replaced(
    model: PreTrainedModel, novices: Mapping[int, Mapping[int, Tensor]]
) -> Iterator[None]:
    """``model`` in which the outputs of some experts (by layer and id) are constants."""

    def replace(forward: Any, vectors: Mapping[int, Tensor]) -> Any:
        def replaced(x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
            gone_TK = torch.isin(index_TK, torch.tensor(sorted(vectors)))
            out_TH = forward(x_TH, index_TK, gate_TK.masked_fill(gone_TK, 0.0))
            for expert, vector_H in vectors.items():
                gate_T = gate_TK.masked_fill(index_TK != expert, 0.0).sum(dim=1)
                out_TH = out_TH + gate_T[:, None] * vector_H
            return out_TH

        return replaced

    changed = [m for n, m in experts_modules(model).items() if layer_of(n) in novices]
    for name, experts in experts_modules(model).items():
        if layer_of(name) in novices:
            experts.forward = replace(experts.forward, novices[layer_of(name)])
    try:
        yield
    finally:
        for experts in changed:
            del experts.forward
