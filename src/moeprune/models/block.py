"""One layer's experts as functions, on weights loaded from disk."""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.models import quirks
from moeprune.models.loading import LayeredModel
from moeprune.models.observe import run_expert
from moeprune.models.sites import MoESite


class LoadedBlock:
    """The experts of a layer that is in memory, as ``core.method.Block`` describes them."""

    def __init__(self, model: LayeredModel, site: MoESite) -> None:
        self._model, self._site = model, site

    @property
    def gated_inputs(self) -> bool:
        """Whether the model multiplies the gate into the input and not into the output."""
        return type(self._site.experts).__name__ in quirks.GATED_INPUTS

    def hidden(self, expert: int, x_SH: Tensor) -> Tensor:
        """The down matrix's input of one expert, float32 [S, I]."""
        return self._run(expert, x_SH)[0]

    def outputs(self, expert: int, x_SH: Tensor) -> Tensor:
        """The output of one expert before the gate, float32 [S, H]."""
        return self._run(expert, x_SH)[1]

    def _run(self, expert: int, x_SH: Tensor) -> tuple[Tensor, Tensor]:
        x = x_SH.to(self._model.device, self._model.dtype)
        with torch.no_grad():
            h_SI, f_SH = run_expert(self._site.experts, expert, x)
        return h_SI.float(), f_SH.float()


class BlockLoader:
    """Loads the layers whose experts are asked for, one at a time."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model
        self._loaded: int | None = None

    def block(self, site: MoESite) -> LoadedBlock:
        """One layer's experts; the layer asked for before is freed."""
        if self._loaded != site.shape.layer:
            self.close()
            self._model.load_layer(site.shape.layer)
            self._loaded = site.shape.layer
        return LoadedBlock(self._model, site)

    def close(self) -> None:
        """Free the layer that is loaded."""
        if self._loaded is not None:
            self._model.free_layer(self._loaded)
            self._loaded = None
