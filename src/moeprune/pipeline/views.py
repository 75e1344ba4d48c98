"""What methods look at, one layer after another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from moeprune.core.method import LayerView
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import DataError
from moeprune.models.block import BlockLoader
from moeprune.models.layout import DiskExperts, DiskTensor, read_router
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite
from moeprune.models.store import StatisticsStore
from moeprune.pipeline.inputs import Progress


class Views:
    """One ``LayerView`` after another; can be iterated more than once."""

    def __init__(
        self,
        model: LayeredModel,
        layout: Mapping[str, DiskTensor],
        store: StatisticsStore | None,
        progress: Progress,
        only: Collection[int] | None = None,
    ) -> None:
        self._model, self._layout, self._store = model, dict(layout), store
        self._progress = progress
        self._loader = BlockLoader(model)
        self._sites = [
            site for index, site in sorted(model.sites.items()) if only is None or index in only
        ]

    @property
    def shapes(self) -> list[LayerShape]:
        """Sizes of the layers, ascending."""
        return [site.shape for site in self._sites]

    def only(self, layers: Collection[int]) -> Views:
        """Of some layers."""
        return Views(self._model, self._layout, self._store, self._progress, layers)

    def view(self, site: MoESite, statistics: LayerStatistics | None) -> LayerView:
        """One layer with these statistics."""
        experts = DiskExperts(self._model.checkpoint, self._layout, site)
        return LayerView(
            site.shape,
            statistics,
            experts,
            block=lambda: self._loader.block(site),
            router=lambda: read_router(self._model.checkpoint, self._layout, site.shape.layer),
        )

    def at(self, index: int) -> LayerView:
        """One layer with the statistics that there are."""
        site = self._model.sites[index]
        statistics = None if self._store is None else self._store.layer(index)
        if statistics is not None and statistics.shape != site.shape:
            raise DataError(f"the statistics of layer {index} are of another shape of layer")
        return self.view(site, statistics)

    def told(self, number: int) -> None:
        """Tell the progress that so many layers are done; after the last one there is none left."""
        self._progress("planning", number, len(self._sites))
        if number == len(self._sites):
            self._loader.close()

    def __iter__(self) -> Iterator[LayerView]:
        for number, site in enumerate(self._sites):
            yield self.at(site.shape.layer)
            self.told(number + 1)
