"""The calibration of the layers of one call of a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .layer_state import Layer


class CalibratedLayers:
    """Layers that are observed together.

    Attributes:
        layers: one ``Layer`` for each candidate node, in the order of their indices.
    """

    layers: tuple[Layer, ...]

    def is_calibrated(self) -> bool:
        """Whether observing is complete."""
        return all(layer.frozen for layer in self.layers)

    def calls(self) -> int:
        """The number of calls for which every layer that is not calibrated yet has been observed."""
        return min((layer.calls for layer in self.layers if not layer.frozen), default=0)

    @contextlib.contextmanager
    def observed_or_not(self) -> Iterator[None]:
        """Discards the observations of a call that fails within the block."""
        layers = [layer for layer in self.layers if not layer.frozen]
        kept = {id(layer.observed): layer.observed.copied() for layer in layers}  # some layers share their ranges
        before = [(kept[id(layer.observed)], layer.smoothing) for layer in layers]
        try:
            yield
        except BaseException:
            for layer, (observed, smoothing) in zip(layers, before, strict=True):
                layer.go_back(observed, smoothing)
            raise

    def count_call(self, fingerprint: str, operations: str = "") -> None:
        """Count one observed call of a model whose weights have this fingerprint, in a graph of these operations."""
        for layer in set(self.layers):
            layer.count_call(fingerprint, operations)

    def is_calibrated_for(self, fingerprint: str, operations: str) -> bool:
        """Whether every layer was observed with these weights in such a graph only."""
        return all((layer.calibrated_for, layer.calibrated_in) == (fingerprint, operations) for layer in self.layers)

    def freeze(self) -> None:
        """End observing: fix the ranges and free the histograms."""
        for layer in self.layers:
            layer.freeze()
        for layer in self.layers:  # layers that read one tensor share its histograms
            layer.observed.histograms.clear()

    def smoothing(self) -> dict[int, bytes]:
        """By index, the factors of the layers whose input is smoothed, as bytes that can be compared."""
        vectors = {index: layer.smoothing for index, layer in enumerate(self.layers)}
        return {index: vector.cpu().numpy().tobytes() for index, vector in vectors.items() if vector is not None}
