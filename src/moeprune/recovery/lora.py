"""Low-rank healing through peft: matrices beside the weights, added to them when it is over.

Linear layers and fused experts need adapters of their own: peft has no dropout for parameters that
are no layer. Both are active at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from moeprune.errors import MoepruneError
from moeprune.models.loading import find_layers
from moeprune.recovery.groups import Parameters
from moeprune.recovery.training import Training

_PREFIX = "base_model.model."
_LINEAR, _STACKED = "linear", "experts"


def targets(model: nn.Module, parameters: Parameters, wanted: Iterable[str]) -> dict[str, str]:
    """What gets low-rank matrices, with its group: weights of linear layers, experts, routers.

    Raises:
        MoepruneError: nothing of the groups can have any.
    """
    prefix, _ = find_layers(model)
    wanted = tuple(wanted)
    found = {}
    for group in wanted:
        for name in parameters.groups.get(group, ()):
            stacked = name in parameters.masked or (group == "routers" and name.endswith("weight"))
            if stacked or (name.startswith(prefix + ".") and _is_linear(model, name)):
                found[name] = group
    if not found:
        raise MoepruneError(
            f"the student has no {' or '.join(wanted)} that LoRA could adapt",
            "--train experts,rest",
        )
    return found


def _is_linear(model: nn.Module, name: str) -> bool:
    """Whether a name is the weight of a linear layer that is called as one.

    Not so of what Mamba's kernels read past its module, which peft refuses.
    """
    owner, _, last = name.rpartition(".")
    around, _, own = owner.rpartition(".")
    if own == "out_proj" and hasattr(model.get_submodule(around), "conv1d"):
        return False
    return last == "weight" and isinstance(model.get_submodule(owner), nn.Linear)


def require_peft() -> None:
    """Raise ``MoepruneError`` unless peft is installed."""
    if find_spec("peft") is None:
        raise MoepruneError("lora needs peft", "pip install 'moeprune[recover]'")


class Adapters:
    """A model with low-rank matrices beside some of its weights.

    Args:
        model: the model; it is changed in place until ``merge``.
        chosen: see ``targets``.
        made: rank, alpha and dropout.

    Raises:
        MoepruneError: peft is not installed, or cannot adapt this model.
    """

    def __init__(self, model: nn.Module, chosen: dict[str, str], made: Training) -> None:
        require_peft()
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415  (an optional dependency)

        linear = [name.removesuffix(".weight") for name in chosen if _is_linear(model, name)]
        stacked = [name for name in chosen if name.removesuffix(".weight") not in linear]
        common = {"r": made.rank, "lora_alpha": made.alpha, "bias": "none"}
        parts = {}
        if linear:
            parts[_LINEAR] = LoraConfig(target_modules=linear, lora_dropout=made.dropout, **common)
        if stacked:
            parts[_STACKED] = LoraConfig(target_modules=[], target_parameters=stacked, **common)
        owners = {name.rpartition(".")[0]: group for name, group in chosen.items()}
        (first, config), *others = parts.items()
        try:
            self.model: Any = get_peft_model(model, config, adapter_name=first)
            for name, more in others:
                self.model.add_adapter(name, more)
        except (ValueError, NotImplementedError) as error:
            raise MoepruneError(f"peft cannot adapt this model: {error}") from error
        self.model.base_model.set_adapter(list(parts))
        self.groups = {
            name: owners[_owner(name)]
            for name, p in self.model.named_parameters()
            if p.requires_grad
        }

    def merge(self) -> Any:
        """Add the matrices to the weights; returns the model as it was before, with new values."""
        return self.model.merge_and_unload()

    def save(self, folder: Path) -> None:
        """Save the matrices as peft does, one directory per adapter."""
        self.model.save_pretrained(folder)


def _owner(name: str) -> str:
    """The module that a low-rank matrix stands beside."""
    path = name.removeprefix(_PREFIX).partition(".lora_")[0]
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
