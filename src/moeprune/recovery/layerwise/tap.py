"""What goes into a layer's MoE block and what comes out, one row per token.

Axes: B sequences, L tokens, T tokens of all batches, n some of them, H width, R outputs of a
router.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.models.walk import Batch


class _Here(threading.local):
    batch: int = 0


_HERE = _Here()


class _Enough(Exception):
    """Ends a block's forward behind its router."""


def block_of(model: LayeredModel, site: MoESite) -> nn.Module:
    """The module that holds router and experts, and is called with hidden states.

    Raises:
        UnsupportedModelError: it is the decoder layer itself.
    """
    name = site.experts_name.rpartition(".")[0]
    if name == f"{model.prefix}.{site.layer}":
        raise UnsupportedModelError(
            f"{type(site.experts).__name__} stands in the decoder layer without a block of its own",
            "leave out --layerwise",
        )
    block: nn.Module = model.model.get_submodule(name)
    return block


class Tap:
    """Rows of one MoE block after another, in buffers that are used again for the next layer.

    Args:
        batches: what walks; their tokens follow each other in the buffers.
        dtype, device: of the buffers.

    Attributes:
        x_TH, y_TH: inputs and outputs of the block.
        z_TR: logits of its router, if they were asked for.
    """

    def __init__(self, batches: Sequence[Batch], dtype: torch.dtype, device: torch.device) -> None:
        ends = torch.tensor([batch.ids_BL.numel() for batch in batches]).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        self.rows = ends[-1]
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}
        self._order: list[int | str] = []
        self._allocating = threading.Lock()  # batches run in threads, and fill one buffer

    @property
    def x_TH(self) -> Tensor:
        """Inputs of the block."""
        return self._buffers["0"]

    @property
    def y_TH(self) -> Tensor:
        """Its outputs, or what ``buffer`` was filled with."""
        return self._buffers["y"]

    @property
    def z_TR(self) -> Tensor:
        """The router's logits."""
        return self._buffers["z"]

    def begin(self, batch: int) -> None:
        """The batch that this thread computes from now on."""
        _HERE.batch = batch

    @contextmanager
    def listening(self, block: nn.Module, router: nn.Module | None = None) -> Iterator[None]:
        """Keep what goes through ``block``, and logits of ``router`` if it is given."""
        with ExitStack() as stack:
            stack.callback(
                block.register_forward_pre_hook(self._keep_inputs, with_kwargs=True).remove
            )
            stack.callback(block.register_forward_hook(self._keep_output).remove)
            if router is not None:
                stack.enter_context(self.hearing(router))
            yield

    @contextmanager
    def hearing(self, router: nn.Module) -> Iterator[None]:
        """Keep logits of ``router`` alone."""
        handle = router.register_forward_hook(self._keep_logits)
        try:
            yield
        finally:
            handle.remove()

    def call(self, block: nn.Module, rows: Any) -> Tensor:
        """The block's output for some rows, [n, H]."""
        args: list[Tensor] = []
        named: dict[str, Tensor] = {}
        for key in self._order:
            rows_n = self._buffers[str(key)][rows][None]
            rows_n = rows_n.float() if rows_n.is_floating_point() else rows_n
            if isinstance(key, int):
                args.append(rows_n)
            else:
                named[key] = rows_n
        return _rows(_first(block(*args, **named)))

    def call_router(self, block: nn.Module, router: nn.Module, rows: Any) -> Tensor:
        """Logits of the block's router for some rows, [n, R]; experts are not computed."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(logits_of(module, output))
            raise _Enough

        handle = router.register_forward_hook(stop)
        try:
            self.call(block, rows)
        except _Enough:
            pass
        finally:
            handle.remove()
        return found[0]

    def buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer of ``width`` numbers per token, allocated when it is first asked for."""
        return self._shaped(name, (width,), dtype or self._dtype)

    def _shaped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self._allocating:
            held = self._buffers.get(name)
            if held is None or held.shape[1:] != shape:
                held = torch.empty(self.rows, *shape, dtype=dtype, device=self._device)
                self._buffers[name] = held
            return held

    def _keep_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found: dict[int | str, Any] = dict(enumerate(args))
        found.update(kwargs)
        if 0 not in found and "hidden_states" in found:
            found = {0: found.pop("hidden_states"), **found}
        first = found[0]
        order: list[int | str] = []
        for key, value in found.items():
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape[:2] != first.shape[:2]:
                raise UnsupportedModelError(
                    f"{type(module).__name__} is given more than a row per token",
                    "leave out --layerwise",
                )
            rows = value.flatten(0, 1)
            if rows.is_floating_point():
                self.buffer(str(key), rows.shape[1])[self.slices[_HERE.batch]] = rows
            else:
                held = self._shaped(str(key), tuple(rows.shape[1:]), rows.dtype)
                held[self.slices[_HERE.batch]] = rows
            order.append(key)
        self._order = order

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        y_TH = _rows(_first(output))
        self.buffer("y", y_TH.shape[1])[self.slices[_HERE.batch]] = y_TH

    def _keep_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        z_TR = logits_of(module, output)
        self.buffer("z", z_TR.shape[1], torch.float32)[self.slices[_HERE.batch]] = z_TR.float()


def logits_of(router: nn.Module, output: Any) -> Tensor:
    """The logits among what a router returns, [T, R]."""
    position = quirks.LOGITS_POSITION.get(type(router).__name__, 0)
    logits: Tensor = output[position] if isinstance(output, (tuple, list)) else output
    return logits.reshape(-1, logits.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
