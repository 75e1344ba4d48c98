"""Attached heads: layers in a checkpoint that transformers' model class does not load.

Checkpoints of DeepSeek-V3, GLM-4.5, Qwen3-Next, MiMo and others carry extra prediction layers after
the last decoder layer (``model.layers.<L>.*``) or beside them (``mtp.*``). Serving engines build
them with the expert count of config.json, so they may never keep another one.

What happens to them when a plan is carried out:

- it deletes experts, ``keep-pruned``: a head loses the experts that the nearest (last) MoE layer
  loses, the others are renumbered, its router rows are sliced;
- it deletes none (novices, weight masks): the router and the number of experts stay as they are, so
  heads are copied whole; constants and masks are for the layers that were observed;
- ``drop``: no tensor of a head is written, and config.json says that there is none.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moeprune.errors import MoepruneError, PlanError, UnsupportedModelError, nearest
from moeprune.models import quirks
from moeprune.models.checkpoint import TensorInfo
from moeprune.models.layout import DiskTensor
from moeprune.models.loading import LayeredModel

KEEP_PRUNED = "keep-pruned"
DROP = "drop"
CHOICES = (KEEP_PRUNED, DROP)

_LAYER = re.compile(r"(?P<list>(?:[^.]+\.)*?)(?P<index>\d+)\.(?P<rest>.+)")
_EXPERT = re.compile(r"(?P<head>.*experts\.)(?P<expert>\d+)\.(?P<tail>.+)")
_HEAD_NAME = re.compile(r"(?:^|[._])(?:mtp|nextn)")
_HINT = "leave the attached heads out: --mtp drop"


@dataclass(frozen=True)
class Attached:
    """The attached heads of a checkpoint.

    Attributes:
        heads: all tensors of each head, by the beginning of their names.
        tensors: those that have to change when experts go, by name on disk; ``layer`` of each is
            the MoE layer whose plan it follows.
        dropped: whether the heads are left out.
    """

    heads: Mapping[str, list[str]]
    tensors: Mapping[str, DiskTensor]
    dropped: bool

    @cached_property
    def keys(self) -> frozenset[str]:
        """The names of all tensors of all heads."""
        return frozenset(key for keys in self.heads.values() for key in keys)

    def counts(self) -> dict[str, int]:
        """Tensors of the heads by what happens to them; empty if there are none."""
        edited = len(self.tensors)
        rest = {"dropped" if self.dropped else "copied": len(self.keys) - edited}
        return {what: n for what, n in ({"pruned": edited} | rest).items() if n}


def check_choice(mtp: str) -> None:
    """Raise ``MoepruneError`` unless ``mtp`` is one of ``CHOICES``."""
    if mtp not in CHOICES:
        raise MoepruneError(f"unknown --mtp {mtp!r}", nearest(mtp, CHOICES))


def find_attached(
    model: LayeredModel, layout: Mapping[str, DiskTensor], mtp: str, deletes: bool
) -> Attached:
    """The attached heads of a checkpoint, and what has to be done to them.

    Args:
        model: the model; whatever its class loads is no attached head.
        layout: its own experts and routers, by which those of the heads are recognised.
        mtp: one of ``CHOICES``.
        deletes: whether experts are deleted; if not, heads that are kept stay as they are.

    Raises:
        UnsupportedModelError: a tensor that is not loaded belongs to experts but to no head, or, in
            a head that is to be pruned, its name is not one that the model's own layers explain.
    """
    template = _Template.of(model, layout)
    heads = {}
    for root, keys in _unused(model, layout).items():
        if template.is_layer(root) or _HEAD_NAME.search(root):
            heads[root] = keys
        elif template.holds_experts(keys):  # left over in a layer, or of another model beside it
            raise UnsupportedModelError(
                f"{keys[0]} belongs to experts, transformers does not load it, and it is not in a "
                "prediction layer by its name"
            )
    tensors: dict[str, DiskTensor] = {}
    if deletes and mtp == KEEP_PRUNED:
        infos = model.checkpoint.tensors
        for keys in heads.values():
            tensors |= template.understand({key: infos[key] for key in keys})
    return Attached(heads, tensors, mtp == DROP)


def _unused(model: LayeredModel, layout: Mapping[str, DiskTensor]) -> dict[str, list[str]]:
    """Names that the model does not use, by the shortest beginning that no used name shares."""
    names = model.checkpoint.tensors
    used_names = [key for key in names if model.uses(key) or key in layout]
    used = {prefix for key in used_names for prefix in _prefixes(key)}
    found: dict[str, list[str]] = {}
    for key in names.keys() - set(used_names):
        root = next(prefix for prefix in [*_prefixes(key), key] if prefix not in used)
        found.setdefault(root, []).append(key)
    return {root: sorted(found[root]) for root in sorted(found)}


def _prefixes(key: str) -> list[str]:
    """``a.``, ``a.b.`` of ``a.b.c``."""
    return [key[: i + 1] for i, letter in enumerate(key) if letter == "."]


def _split(key: str, names: Container[str]) -> tuple[str, str] | None:
    """The beginning of a block and the name inside it, if that is one of ``names``."""
    for prefix in ["", *_prefixes(key)]:
        if key[len(prefix) :] in names:
            return prefix, key[len(prefix) :]
    return None


@dataclass(frozen=True)
class _Template:
    """The nearest MoE layer, whose names say what the tensors of a head are.

    Attributes:
        layer, experts: its index and its number of experts.
        layers: the beginning of the names of all decoder layers.
        known: the names of its tensors, without their beginning.
        edited: those of experts and routers.
        sizes: entries along ``dim`` of those that hold all experts.
    """

    layer: int
    experts: int
    layers: str
    known: frozenset[str]
    edited: Mapping[str, DiskTensor]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, model: LayeredModel, layout: Mapping[str, DiskTensor]) -> _Template:
        layer = max(model.sites)
        own = {key: tensor for key, tensor in layout.items() if tensor.layer == layer}
        match = _LAYER.fullmatch(next(iter(own)))
        assert match is not None, "tensors of a layer have its index in their names"
        layers, prefix = match["list"], f"{match['list']}{match['index']}."
        infos = model.checkpoint.tensors
        edited = {key.removeprefix(prefix): tensor for key, tensor in own.items()}
        return cls(
            layer,
            model.sites[layer].shape.experts,
            layers,
            frozenset(key.removeprefix(prefix) for key in infos if key.startswith(prefix)),
            edited,
            {n: infos[t.key].shape[t.dim] for n, t in edited.items() if t.expert is None},
        )

    def is_layer(self, root: str) -> bool:
        """Whether ``root`` is a whole layer in the list of decoder layers."""
        return root.removeprefix(self.layers).removesuffix(".").isdecimal()

    def holds_experts(self, keys: Iterable[str]) -> bool:
        """Whether some tensor is an expert's, or all experts' together."""
        fused = {name for name in self.sizes if self.edited[name].role != "router"}
        return any(_EXPERT.fullmatch(key) or _split(key, fused) for key in keys)

    def understand(self, infos: Mapping[str, TensorInfo]) -> dict[str, DiskTensor]:
        """What in one head has one entry per expert, by name on disk."""
        found: dict[str, DiskTensor] = {}
        blocks: dict[str, set[str]] = {}  # names in each MoE block, by its beginning
        for key, info in infos.items():
            if (split := _split(key, self.edited)) is None:
                continue
            block, name = split
            blocks.setdefault(block, set()).add(name)
            found[key] = replace(self.edited[name], key=key, quantised=None)
            size = self.sizes.get(name)
            if size is not None and info.shape[self.edited[name].dim :][:1] != (size,):
                raise _not_understood(key, f"{list(info.shape)}, where the layers have {size}")
        found |= self._companions(infos.keys() - found.keys(), blocks)
        self._refuse_unexplained({k: i for k, i in infos.items() if k not in found}, blocks)
        self._check_complete(found, blocks)
        return found

    def _companions(self, keys: Iterable[str], blocks: Iterable[str]) -> dict[str, DiskTensor]:
        """An expert's tensors that the model's own layers do not have, such as scales."""
        inside = {name.partition("experts.")[0] for name in self.edited if "experts." in name}
        known = {f"{block}{path}experts." for block in blocks for path in inside}
        found = {}
        for key in sorted(keys):
            match = _EXPERT.fullmatch(key)
            if match is not None and match["head"] not in known:
                raise _not_understood(key, "experts that are not laid out as the layers' are")
            if match is not None:
                found[key] = DiskTensor(key, self.layer, "other", int(match["expert"]))
        return found

    def _check_complete(self, found: Iterable[str], blocks: Mapping[str, AbstractSet[str]]) -> None:
        """Every block has its whole router and all experts."""
        ids: dict[str, set[int]] = {}
        for match in map(_EXPERT.fullmatch, found):
            if match is not None:
                name = f"{match['head']}*.{match['tail']}"
                ids.setdefault(name, set()).add(int(match["expert"]))
        for name, experts in ids.items():
            if experts != set(range(self.experts)):
                raise _not_understood(name, f"not one for each of {self.experts} experts")
        routers = {name for name, tensor in self.edited.items() if tensor.role == "router"}
        for block, names in blocks.items():
            if missing := routers - names:
                raise _not_understood(block + min(missing), "it is missing")
            if names == routers and not any(name.startswith(block) for name in ids):
                raise _not_understood(block + min(names), "a router without experts")

    def _refuse_unexplained(self, infos: Mapping[str, TensorInfo], blocks: Iterable[str]) -> None:
        """Refuse what stands beside the router, or is named like it, and has E entries."""
        words = ("experts", *quirks.ROUTER_NAMES)
        around = {n.split(f"{w}.")[0] for n in self.edited for w in words if f"{w}." in n}
        beside = tuple(block + path for block in blocks for path in around)
        for key, info in infos.items():
            named = set(words).intersection(key.split("."))
            if self.experts not in info.shape or not (named or key.startswith(beside)):
                continue
            if _split(key, self.known) is None:
                raise _not_understood(key, f"{list(info.shape)} may be one entry per expert")


def _not_understood(key: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{key}, in a head that transformers does not load: {why}", _HINT)


def check_equal_counts(counts: Mapping[int, int], attached: Attached) -> None:
    """Raise ``PlanError`` if heads would have to be pruned and layers keep different numbers.

    Serving engines build a head with the one count at the top of config.json, so it cannot follow
    a layer that has another. ``counts`` is what each layer's router selects among in the result.
    """
    least, most = min(counts.values()), max(counts.values())
    if attached.tensors and least != most:
        raise PlanError(
            f"the plan keeps between {least} and {most} experts per layer, and the "
            f"attached head {next(iter(attached.heads))}* can have only the number in config.json",
            _HINT,
        )


def refuse_narrow(attached: Attached, width: int | None) -> None:
    """Raise ``PlanError`` if experts get another ``width`` and a head with experts would stay.

    config.json knows one width, and no plan says which neurons of a head's experts go.
    """
    if width is not None and attached.heads and not attached.dropped:
        raise PlanError(
            f"the plan narrows experts to {width} neurons, and those of the attached head "
            f"{next(iter(attached.heads))}* cannot follow",
            _HINT,
        )


def without_heads(config: dict[str, Any]) -> None:
    """Let a raw config.json say, in place, that there are no attached heads."""
    parts = [part for part in (config, *config.values()) if isinstance(part, dict)]
    for part in parts:
        counts = [part[key] for key in quirks.MTP_COUNT_KEYS if isinstance(part.get(key), int)]
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and any(counts):
            for key in quirks.MTP_PADDED_LISTS:  # some vendors let them cover the heads as well
                values = part.get(key)
                if isinstance(values, list) and len(values) == layers + max(counts):
                    part[key] = values[:layers]
        part.update({key: 0 for key in quirks.MTP_COUNT_KEYS if part.get(key) is not None})
        part.update({key: False for key in quirks.MTP_FLAGS if part.get(key) is not None})
    if not any(key in part for part in parts for key in quirks.MTP_COUNT_KEYS):
        text = config.get("text_config")  # classes may assume one where nothing is said
        (text if isinstance(text, dict) else config)[quirks.MTP_COUNT_KEYS[0]] = 0
