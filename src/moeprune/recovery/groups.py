"""Groups of a model's parameters, the zeros that have to stay, and what training changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.models.loading import find_layers
from moeprune.models.sites import MoESite, find_sites
from moeprune.models.special import describe, matrix_role


@dataclass(frozen=True)
class Parameters:
    """A model's parameters by group.

    Attributes:
        groups: names by group, see ``training.GROUPS``; groups without parameters are not there.
        sites: the MoE blocks by layer.
        masked: names of experts' matrices, in which a weight that is zero stays zero.
    """

    groups: Mapping[str, tuple[str, ...]]
    sites: Mapping[int, MoESite]
    masked: tuple[str, ...]

    def names(self, groups: Iterable[str]) -> tuple[str, ...]:
        """All names of some groups."""
        return tuple(name for group in groups for name in self.groups.get(group, ()))

    def group_of(self, name: str) -> str:
        """The group of one parameter."""
        return next(group for group, names in self.groups.items() if name in names)


def parameters_of(model: nn.Module) -> Parameters:
    """Sort the parameters of a loaded model."""
    describe(model)
    prefix, _ = find_layers(model)
    sites = find_sites(model, prefix)
    roots = {site.experts_name + ".": site for site in sites.values()}
    routers = {tensor.name for site in sites.values() for tensor in site.router_tensors}
    modules = {id(site.router) for site in sites.values()}
    routers |= {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if id(module) in modules
        for own, _ in module.named_parameters()
    }
    groups: dict[str, list[str]] = {}
    masked = []
    for name, _ in model.named_parameters():
        root = next((root for root in roots if name.startswith(root)), None)
        if root is not None and name.endswith(".novice_value"):
            group = "novices"
        elif root is not None:
            group = "experts"
            if matrix_role(roots[root].experts, name.removeprefix(root)) is not None:
                masked.append(name)
        elif name in routers:
            group = "routers"
        else:
            group = "embeddings" if _is_embedding(model, name) else "rest"
        groups.setdefault(group, []).append(name)
    return Parameters({g: tuple(names) for g, names in groups.items()}, sites, tuple(masked))


def _is_embedding(model: Any, name: str) -> bool:
    """Whether a parameter belongs to the embeddings or to the head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    owner = model.get_submodule(name.rpartition(".")[0])
    return any(owner is module for module in ends if module is not None)


def choose(model: nn.Module, parameters: Parameters, wanted: Iterable[str]) -> tuple[str, ...]:
    """Let the parameters of the groups train and freeze all others; returns the names.

    Raises:
        MoepruneError: the model has no parameter of these groups.
    """
    names = parameters.names(wanted)
    if not names:
        raise MoepruneError(
            f"the student has no {' or '.join(wanted)} to train",
            f"it has {', '.join(parameters.groups)}",
        )
    chosen = set(names)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return names


def trained(model: nn.Module, parameters: Parameters) -> dict[str, str]:
    """The group of every parameter that trains."""
    return {
        name: parameters.group_of(name) for name, p in model.named_parameters() if p.requires_grad
    }


class Zeros:
    """Keeps weights at zero that were zero when training began.

    Gradients are zeroed before every step, so that the optimiser's moments are zero there too, and
    the weights after it: whatever an optimiser does, they are exactly zero.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._masks: list[tuple[nn.Parameter, Tensor]] = []
        self._names: list[str] = []
        self.count = 0
        for name in names:
            p = model.get_parameter(name)
            zero = p.detach() == 0
            found = int(zero.sum())
            if found:
                self._masks.append((p, zero))
                self._names.append(name)
                self.count += found

    def gradients(self) -> None:
        """Before a step."""
        for p, zero in self._masks:
            if p.grad is not None:
                p.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def weights(self) -> None:
        """After a step."""
        for p, zero in self._masks:
            p.masked_fill_(zero, 0)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the zeros back into a model whose parameters may be others by now."""
        for name, (_, zero) in zip(self._names, self._masks, strict=True):
            model.get_parameter(name).masked_fill_(zero, 0)


def digests(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the values of parameters."""
    return {name: digest(model.get_parameter(name)) for name in names}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).hexdigest()  # type: ignore[arg-type]
