"""A model on the meta device whose decoder layers are filled from disk one at a time.

This is the only module that calls transformers' internal loading functions; pyproject pins the
minor version, and tests/models/test_walk.py holds them to bit-equality with ``from_pretrained``.
"""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from moeprune.errors import CheckpointError, MoepruneError, UnsupportedModelError
from moeprune.models import uneven_runtime
from moeprune.models.bounds import RESIDENT, Limits
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.fused import Fused, fill, find_fused, kept_wider, readable
from moeprune.models.generated import own_class
from moeprune.models.native import (
    first_line,
    model_class,
    quiet_transformers,
    read_config,
    text_config,
)
from moeprune.models.quantised import Quantisation, lazy_state
from moeprune.models.sites import MoESite, find_sites, is_experts, is_uneven, resize_facts
from moeprune.models.special import describe
from moeprune.models.staging import Spare, unwritten


def skeleton(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with parameters on meta and real buffers (rotary tables, correction biases).

    Raises:
        UnsupportedModelError: its class cannot be made with this configuration.
    """
    cls = model_class(checkpoint, config)
    if not isinstance(config, cls.config_class):
        config = text_config(config)  # of a model with towers, the language model alone
    cls = own_class(cls, text_config(config))
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model: nn.Module = cls._from_config(config, dtype=dtype).eval()
            describe(model)
            if is_uneven(config):
                uneven_runtime.install(model, **resize_facts(model, find_layers(model)[0]))
    except MoepruneError:
        raise
    except Exception as error:  # whatever a model makes of nonsense
        raise UnsupportedModelError(
            f"{cls.__name__} cannot be made from config.json", first_line(error)
        ) from error
    return model


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The language model's list of decoder layers, as (qualified name, module list).

    Raises:
        UnsupportedModelError: there is none of the configured length.
    """
    config = text_config(model.config)
    counts = {getattr(config, key, None) for key in ("num_hidden_layers", "num_layers")}
    lists = []
    owners = {"": model}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            # a vision or audio tower may have as many layers; its configuration is another
            owner = max((o for o in owners if f"{name}.".startswith(f"{o}." if o else "")), key=len)
            if isinstance(owners[owner].config, type(config)):
                lists.append((name, module))
    for name, module in lists:
        if any(is_experts(m) for m in module.modules()):
            return name, module
    if lists:
        return lists[0]
    raise UnsupportedModelError(f"{config.model_type}: its list of decoder layers was not found")


class LayeredModel:
    """A causal language model of which only the non-layer tensors stay in memory.

    Args:
        checkpoint: where the weights are.
        dtype: to compute in; None takes the checkpoint's own.
        device: to compute on.

    Attributes:
        model: the transformers model; decoder layers are on meta unless loaded.
        layers: its list of decoder layers.
        prefix: the qualified name of that list.
        quantisation: how the weights are stored.
        sites: MoE blocks by layer index.
        changing: held while modules are filled, edited or emptied.
        limits: what walks over it are held to.
        changes: whether layers are changed as they are loaded.
    """

    changes: ClassVar[bool] = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.config = read_config(checkpoint)
        self.quantisation = Quantisation.of(checkpoint)
        stored = [getattr(c, "dtype", None) for c in (text_config(self.config), self.config)]
        self.dtype = dtype or stored[0] or stored[1] or torch.float32
        self.device = torch.device(device)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise UnsupportedModelError(
                f"{checkpoint.path}: models of {self.dtype} cannot be computed"
            )
        self.model: Any = skeleton(checkpoint, self.config, self.dtype)
        self.prefix, self.layers = find_layers(self.model)
        self.sites: dict[int, MoESite] = find_sites(self.model, self.prefix)
        self._mapping = get_model_conversion_mapping(self.model, None, None)
        self._names = self._in_memory_names()
        self._resident = False
        self._restore: dict[int, Callable[[], None]] = {}
        # loading one layer goes over all modules while another may be edited or freed
        self.changing = threading.RLock()
        self.limits = Limits()
        self._spare: Spare | None = None

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Layers are read into the memory of those that were freed.

        Memory of a layer waits for the next one until ``give_back``; who edits layers, or loads
        others meanwhile, has no room for that.
        """
        self._spare = Spare()
        try:
            yield
        finally:
            self._spare = None

    def give_back(self) -> None:
        """Give back memory that freed layers have left: no further one is loaded."""
        if self._spare is not None:
            self._spare.give_back()

    def beside(self, index: int) -> int:
        """Bytes that changing a layer takes beside it while it is loaded."""
        return 0

    def when_freed(self, index: int, restore: Callable[[], None]) -> None:
        """Call ``restore`` before a layer is freed: whoever changes its sizes changes them back."""
        self._restore[index] = restore

    def _in_memory_names(self) -> dict[str, tuple[str | None, str | None]]:
        """Disk name -> (parameter name or None if the model does not use it, matched pattern)."""
        renamings = [w for w in self._mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in self._mapping if isinstance(w, WeightConverter)]
        state = self.model.state_dict()
        base = self.model.base_model_prefix
        names: dict[str, tuple[str | None, str | None]] = {}
        for key in self.quantisation.names(self.checkpoint):
            name, pattern = rename_source_key(key, renamings, converters, base, state)
            if name not in state and key in state:
                name, pattern = key, None
            names[key] = (name if name in state else None, pattern)
        return names

    def target(self, key: str) -> tuple[str | None, str | None]:
        """The parameter that a weight on disk becomes (part of), and the conversion's pattern."""
        return self._names[key]

    def uses(self, key: str) -> bool:
        """Whether a tensor on disk becomes part of a parameter, if only as a scale."""
        part = self.quantisation.parts.get(key)
        return self.target(key if part is None else part.name)[0] is not None

    def disk_name(self, name: str) -> str:
        """The name on disk of a parameter that is stored as it is."""
        [found] = revert_weight_conversion(self.model, {name: torch.empty(0)})
        return str(found)

    def converter(self, pattern: str) -> WeightConverter:
        """The conversion that ``pattern`` belongs to."""
        return next(
            w
            for w in self._mapping
            if isinstance(w, WeightConverter) and pattern in w.source_patterns
        )

    def group(self, name: str) -> int:
        """The layer that a parameter belongs to, or ``RESIDENT``."""
        match = re.match(re.escape(self.prefix) + r"\.(\d+)\.", name)
        return int(match[1]) if match else RESIDENT

    def stored(self, group: int) -> list[tuple[str, str, str | None]]:
        """Weights on disk of a layer or ``RESIDENT``: name, parameter, and conversion's pattern."""
        return self._groups.get(group, [])

    @cached_property
    def _groups(self) -> dict[int, list[tuple[str, str, str | None]]]:
        found: dict[int, list[tuple[str, str, str | None]]] = {}
        for key, (name, pattern) in self._names.items():
            if name is not None:
                found.setdefault(self.group(name), []).append((key, name, pattern))
        return found

    @property
    def is_resident(self) -> bool:
        """Whether ``load_resident`` has been called."""
        return self._resident

    def load_resident(self) -> None:
        """Load what stays in memory: everything outside the decoder layers."""
        if self._resident:
            return
        self._load(RESIDENT)
        self.model.tie_weights()
        missing = [
            name
            for name, p in self.model.named_parameters()
            if p.is_meta and self.group(name) == RESIDENT
        ]
        self._refuse_missing(missing)
        # buffers were built on the CPU; parameters of the layers are still on meta
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self._resident = True

    def load_layer(self, index: int) -> None:
        """Load one decoder layer through transformers' own conversion."""
        self.load_without(index, ())

    def load_without(self, index: int, left_out: Collection[str]) -> None:
        """Load one decoder layer but for the parameters ``left_out``.

        Tensors that need no conversion stay where the file is mapped, exactly as
        ``from_pretrained`` leaves them: some matrix kernels round by the address of their operands.
        Their pages are touched here, so that the disk is read now and not while computing.
        """
        with self.changing:
            self._load(index, left_out)
        missing = [n for n, p in self.layers[index].named_parameters() if p.is_meta]
        at = f"{self.prefix}.{index}."
        self._refuse_missing([name for name in missing if at + name not in left_out])
        for p in self.layers[index].parameters():
            if p.device.type == "cpu" and p.is_contiguous():
                p.data.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()

    def free_layer(self, index: int) -> None:
        """Put one decoder layer back on meta, as it was before anybody edited it."""
        with self.changing:
            restore = self._restore.pop(index, None)
            if restore is not None:
                restore()
            for module in self.layers[index].modules():
                for name, p in module._parameters.items():
                    if p is not None:
                        meta = torch.empty_like(p, device="meta")
                        module._parameters[name] = nn.Parameter(meta, requires_grad=False)

    def in_place(self, keys: Sequence[str]) -> list[Fused]:
        """Parameters that these weights fill one by one, without a copy of all of them."""
        state, infos = self.model.state_dict(), self.checkpoint.tensors
        weights = self.quantisation.weights
        shapes = {key: weights[key].shape if key in weights else infos[key].shape for key in keys}
        names = {key: self._names[key] for key in keys}
        wider = self.model._get_dtype_plan(self.dtype)
        return [
            found
            for found in find_fused(names, self.converter, shapes, state)
            if self._stays(found.name, state)
            and not kept_wider(found.name, wider)
            and readable(found, self.checkpoint, self.quantisation)
        ]

    def _in_place(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The values of those parameters, under their names in the model."""
        chosen = self.in_place(keys)
        dtypes = {f.name: self.model.get_parameter(f.name).dtype for f in chosen}
        blank = unwritten if self._spare is None else self._spare.unwritten
        return fill(chosen, self.checkpoint, self.quantisation, dtypes, self.device, blank)

    def _stays(self, name: str, state: Any) -> bool:
        """Whether transformers takes a parameter under its own name as it is."""
        renamings = [w for w in self._mapping if isinstance(w, WeightRenaming)]
        converters = [w for w in self._mapping if isinstance(w, WeightConverter)]
        base = self.model.base_model_prefix
        renamed, pattern = rename_source_key(name, renamings, converters, base, state)
        return bool(renamed == name and pattern is None)

    def load_shapes(self) -> Any:
        """Run transformers' own conversion on shapes alone; nothing is read.

        The buffers of the model are lost, so use this one for nothing else.

        Returns:
            transformers' report: ``missing_keys``, ``mismatched_keys`` (name, found, expected) and
            ``conversion_errors`` by name.
        """
        shapes = {key: info.shape for key, info in self.checkpoint.tensors.items()}
        shapes |= {name: weight.shape for name, weight in self.quantisation.weights.items()}
        names = [key for key, (name, _) in self._names.items() if name is not None]
        config = LoadStateDictConfig(
            device_map={"": "meta"}, dtype=self.dtype, weight_mapping=self._mapping
        )
        with quiet_transformers(), torch.device("meta"):
            state = {key: torch.empty(shapes[key], dtype=self.dtype) for key in names}
            info, _ = convert_and_load_state_dict_in_model(self.model, state, config, None)
        return info

    def _refuse_missing(self, names: list[str]) -> None:
        if names:
            raise CheckpointError(
                f"{self.checkpoint.path} has no weights for {names[0]} (and {len(names) - 1} more)",
                "the checkpoint is incomplete, or not of this architecture",
            )

    def _load(self, group: int, left_out: Collection[str] = ()) -> None:
        self.fill([key for key, name, _ in self.stored(group) if name not in left_out])

    def fill(self, keys: Sequence[str], rows: Mapping[str, range] | None = None) -> None:
        """Load weights by their names on disk; of those in ``rows`` only these rows."""
        self.quantisation.refuse()
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            weight_mapping=self._mapping,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
        )
        try:
            # opened per layer, so that mapped pages of earlier layers do not stay resident
            whole = self._in_place(keys if rows is None else [k for k in keys if k not in rows])
            keys = [key for key in keys if self._names[key][0] not in whole]
            state = lazy_state(self.checkpoint, self.quantisation, keys, self.dtype, rows) | whole
            whole.clear()
            with quiet_transformers():
                info, _ = convert_and_load_state_dict_in_model(self.model, state, config, None)
        except SafetensorError as error:
            raise CheckpointError(f"damaged weights in {self.checkpoint.path}: {error}") from error
        wrong = [*(str(m) for m in info.mismatched_keys), *(str(e) for e in info.conversion_errors)]
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.path}: weights do not fit the configuration: {wrong[0]}",
                "the checkpoint and its config.json do not belong together",
            )
