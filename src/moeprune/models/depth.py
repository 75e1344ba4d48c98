"""Leaving out whole decoder layers: names, config.json, and the proof that it says so.

What a configuration says about layers is edited where its meaning is known. Whether that was all is
not trusted: the model is built from the new configuration, and each of its layers is compared with
the one it stands for, module by module, by class, parameters, buffers and plain attributes. What
differs is a refusal.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.loading import LayeredModel, find_layers, skeleton
from moeprune.models.native import first_line, text_config
from moeprune.models.quantised import with_description
from moeprune.models.writer import Piece

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "expert_offsets")
_BY_LAYER = (
    "per_layer_config", "experts_per_layer", "approximate_experts", "experts_served_by",
    "expert_skipping",
)  # fmt: skip
_PER_LAYER = re.compile(r"(?!mtp).*(?:layer.*|_types|_per_layer)")
_PATTERNS = ("hybrid_override_pattern",)
_OWN_INDEX = re.compile(r".*(?:layer|idx|index|block).*")
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


@dataclass(frozen=True)
class Shallower:
    """A model without some of its decoder layers.

    Attributes:
        model: the original.
        dropped: the layers that go.
    """

    model: LayeredModel
    dropped: tuple[int, ...]

    @cached_property
    def kept(self) -> list[int]:
        """The layers that stay, ascending."""
        return [index for index in range(len(self.model.layers)) if index not in self.dropped]

    def renamed(self, name: str) -> str | None:
        """A tensor's or module's new name; None if its layer goes.

        Layers behind the model's own, the prediction heads of some families, move up with it.
        """
        match = re.match(re.escape(self.layers_name) + r"(\d+)(?=\.|$)", name)
        if match is None:
            return name
        index = int(match[1])
        if index in self.dropped:
            return None
        new = index - sum(gone < index for gone in self.dropped)
        return f"{self.layers_name}{new}{name[match.end() :]}"

    def pieces(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The tensors that stay, under their new names."""
        found = [(self.renamed(piece.name), piece) for piece in pieces]
        return [replace(piece, name=name) for name, piece in found if name is not None]

    @cached_property
    def layers_name(self) -> str:
        """How the names of tensors in layers begin on disk, up to their index.

        Raises:
            UnsupportedModelError: they do not begin alike.
        """
        common: set[str] | None = None
        for key in self.model.quantisation.names(self.model.checkpoint):
            name = self.model.target(key)[0]
            layer = -1 if name is None else self.model.group(name)
            if layer >= 0:
                found = re.finditer(rf"(?:^|\.)(?={layer}\.)", key)
                starts = {key[: match.end()] for match in found}
                common = starts if common is None else common & starts
        if not common:
            raise UnsupportedModelError("its layers are not stored under one name")
        return min(common, key=len)

    # --- config.json

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """``config``, the raw config.json of the original, for the layers that stay.

        Raises:
            UnsupportedModelError: a model of that configuration is not the original without these
                layers, or it cannot be made.
        """
        self._refuse()
        config = copy.deepcopy(config)
        part = config.get("text_config")
        part = part if isinstance(part, dict) else config
        resolved = text_config(self.model.config).to_dict()
        self._set_counts(part, resolved)
        for key, value in resolved.items():
            new = self._entry(key, value)
            if new is not None:
                part[key] = new
        for key in _PATTERNS:
            if isinstance(part.get(key), str) and len(part[key]) == len(self.model.layers):
                part[key] = "".join(part[key][index] for index in self.kept)
        self._set_dense(part, resolved)
        config = with_description(config, self._modules)
        self._prove(config)
        return config

    def _set_counts(self, part: dict[str, Any], resolved: dict[str, Any]) -> None:
        before = len(self.model.layers)
        for key in _COUNTS:
            value = part.get(key, resolved.get(key))
            # longcat counts two attention blocks per layer
            if isinstance(value, int) and value and value % before == 0:
                part[key] = value // before * len(self.kept)

    def _entry(self, key: str, value: Any) -> Any:
        """What an entry becomes; None if it says nothing about layers."""
        before = len(self.model.layers)
        if key in _BY_LAYER and isinstance(value, dict):
            entries = {int(index): entry for index, entry in value.items()}
            return {str(new): entries[o] for new, o in enumerate(self.kept) if o in entries}
        known = key in _INDEX_LISTS
        if not isinstance(value, (list, tuple)) or not (known or _PER_LAYER.fullmatch(key)):
            return None
        if known:
            return [new for new, old in enumerate(self.kept) if old in value]
        if key == "ple_layer_ids":  # counted from 1
            return [new + 1 for new, old in enumerate(self.kept) if old + 1 in value]
        if len(value) >= before and len(value) - before in (0, *self._heads):
            return [value[index] for index in self.kept] + list(value[before:])
        return None

    @cached_property
    def _heads(self) -> tuple[int, ...]:
        """Numbers of prediction layers that some vendors' lists cover as well."""
        config = self.model.checkpoint.config
        parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        found = [part.get(key) for part in parts for key in quirks.MTP_COUNT_KEYS]
        return tuple(n for n in found if isinstance(n, int))

    def _set_dense(self, part: dict[str, Any], resolved: dict[str, Any]) -> None:
        """Which layers have no experts, where a number or a period says so."""
        for key in _DENSE_FIRST:
            value = part.get(key, resolved.get(key))
            if isinstance(value, int) and value > 0:
                part[key] = sum(index < value for index in self.kept)
        end = part.get("moe_layer_end_index")
        if isinstance(end, int) and end >= 0:
            part["moe_layer_end_index"] = sum(index <= end for index in self.kept) - 1
        if resolved.get("decoder_sparse_step", 1) != 1 and "mlp_only_layers" in resolved:
            part["decoder_sparse_step"] = 1
            dense = [new for new, old in enumerate(self.kept) if old not in self.model.sites]
            part["mlp_only_layers"] = dense

    def _modules(self, described: Any) -> Any:
        """A ``quantization_config`` with the layers' new numbers in names of modules."""
        if isinstance(described, dict):
            return {key: self._modules(value) for key, value in described.items()}
        if not isinstance(described, list):
            return described
        found = [
            self.renamed(entry) if isinstance(entry, str) else self._modules(entry)
            for entry in described
        ]
        return [entry for entry in found if entry is not None]

    # --- refusals

    def _refuse(self) -> None:
        text = text_config(self.model.config)
        reason = quirks.DEPTH_REFUSED.get(text.model_type)
        if reason is not None:
            raise UnsupportedModelError(
                f"layers of {text.model_type} cannot be dropped: {reason}", _OTHER_METHODS
            )
        if not set(self.model.sites) - set(self.dropped):
            raise UnsupportedModelError(
                "no layer with experts would remain", "drop fewer layers: --keep"
            )
        sources = getattr(text, "indexer_types", None) or ()
        for index in self.kept:
            full = [i for i in range(index) if sources[i : i + 1] == ["full"]]
            if sources[index : index + 1] == ["shared"] and full[-1] in self.dropped:
                raise UnsupportedModelError(
                    f"layer {index} uses the index of layer {full[-1]}, which would be dropped",
                    "drop another number of layers: --keep or --ratio",
                )

    def _prove(self, config: dict[str, Any]) -> None:
        kind = text_config(self.model.config).model_type
        checkpoint = self.model.checkpoint
        try:
            with TemporaryDirectory() as folder:  # infinity is spelled in files as nowhere else
                (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
                made = type(self.model.config).from_pretrained(folder)
            new = skeleton(checkpoint, made, self.model.dtype)
            prefix, layers = find_layers(new)
        except UnsupportedModelError as error:
            raise self._cannot(kind, error.hint or error.problem) from error
        except Exception as error:  # whatever a configuration class makes of it
            raise self._cannot(kind, first_line(error)) from error
        if len(layers) != len(self.kept):
            raise self._cannot(kind, f"it would have {len(layers)} layers")
        for position, index in enumerate(self.kept):
            for why in _differences(self.model.layers[index], layers[position], index, position):
                raise self._cannot(kind, f"layer {index}: {why}")
        inside = re.compile(re.escape(prefix) + r"\.\d+\.")
        sides = [
            {n: tuple(p.shape) for n, p in m.state_dict().items() if not inside.match(n)}
            for m in (self.model.model, new)
        ]
        if sides[0] != sides[1]:
            name = min(dict(sides[0].items() ^ sides[1].items()))
            raise self._cannot(kind, f"{name} would be another")

    def _cannot(self, kind: str, why: str) -> UnsupportedModelError:
        first, last = self.dropped[0], self.dropped[-1]
        return UnsupportedModelError(
            f"the configuration of {kind} cannot express that layers {first}..{last} are gone "
            f"({why})",
            "drop another number of layers: --keep or --ratio",
        )


_OTHER_METHODS = "delete or replace experts instead"


class SeveralStates(UnsupportedModelError):
    """A decoder layer hands on more than the residual stream, so it cannot be passed by."""


def pass_through(layer: Any) -> None:
    """Let a loaded decoder layer hand on what it gets, as if it were not there.

    Raises:
        SeveralStates: when it runs, if it hands on more than one state.
    """
    forward = layer.forward

    def skipped(*args: Any, **kwargs: Any) -> Tensor:
        output = forward(*args, **kwargs)  # only to see what a layer of this family returns
        entered: Tensor = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, Tensor):
            raise SeveralStates("its decoder layers hand on more than one state")
        return entered

    layer.forward = skipped


def _differences(old: nn.Module, new: nn.Module, was: int, now: int) -> Iterator[str]:
    """In which ways the layer ``new`` is not ``old`` at another place."""
    before, after = dict(old.named_modules()), dict(new.named_modules())
    if before.keys() != after.keys():
        yield f"{min(before.keys() ^ after.keys())} is in one of the two only"
        return
    for name, module in before.items():
        other = after[name]
        if type(module) is not type(other):
            yield f"{name or 'it'} would be a {type(other).__name__}"
            return
        yield from _different_tensors(name, module, other)
        mine, theirs = _plain(module), _plain(other)
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            if a != b and not _is_index(key, a, b, was, now):
                yield f"{name + '.' if name else ''}{key} would be {b!r}, not {a!r}"


def _is_index(key: str, a: Any, b: Any, was: int, now: int) -> bool:
    """Whether an attribute is the layer's place in the list, or its place among attention blocks.

    Longcat has two of them per layer, so that theirs are 2 * index and 2 * index + 1.
    """
    if key == "layer_idx" and isinstance(a, int) and isinstance(b, int):
        return a - b in (was - now, 2 * (was - now))
    return (a, b) == (was, now) and _OWN_INDEX.fullmatch(key) is not None


def _different_tensors(name: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
    for kind in ("_parameters", "_buffers"):
        mine, theirs = vars(module)[kind], vars(other)[kind]
        if mine.keys() != theirs.keys():
            yield f"{name}: other {kind[1:]}"
            return
        for key, a in mine.items():
            b = theirs[key]
            if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
                yield f"{name}.{key} would have another shape"
            elif a is not None and not a.is_meta and not b.is_meta and not torch.equal(a, b):
                yield f"{name}.{key} would have other values"


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that say how a module computes: numbers, names, flags and lists of them."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (
            isinstance(value, _PLAIN)
            or (isinstance(value, (list, tuple)) and all(isinstance(v, _PLAIN) for v in value))
        )
    }
