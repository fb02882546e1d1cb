"""The registry of all layers in this process."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import fork_locks
from ..kernels.formats import Format
from .layer_state import Layer
from .weight_identity import WeakKey, weak_key

if TYPE_CHECKING:
    from ..graph.conv_geometry import ConvGeometry


class LayerRegistry:
    """Every layer of this process, by weight and by the properties that its state depends on."""

    def __init__(self) -> None:
        self._layers: dict[tuple[Any, ...], weakref.WeakKeyDictionary[WeakKey, dict[int, Layer]]] = {}
        self._lock = fork_locks.lock()  # models may run in threads of their own

    def layer(
        self,
        weight: torch.Tensor,
        geometry: ConvGeometry | None,
        format: Format,
        method: str,
        old: Layer | None = None,
        place: int = 0,
    ) -> Layer:
        """The layer of ``weight`` at the place of this number. ``old`` is the layer of the weight that it replaced in
        the model: returned if it belongs to ``weight`` already, and taken over, if it fits, where ``weight`` has no
        layer. Else a new layer is created."""
        kind = (geometry, format, method, weight.device)
        with self._lock:
            layers = self._layers_of(kind).setdefault(weak_key(weight), {})
            if old is not None and any(layer is old for layer in layers.values()):
                return old  # it belongs to this weight already, perhaps at another place
            if place not in layers:
                first = next(iter(layers.values()), None)
                layers[place] = old if old is not None and old.kind == kind else Layer(*kind, first)
            return layers[place]

    def known(self, layer: Layer, weight: torch.Tensor, place: int) -> Layer:
        """The layer that replaced ``layer`` for ``weight``: another set of its model may have called ``part``
        before."""
        with self._lock:
            layers = self._layers_of(layer.kind).get(weak_key(weight), {})
            return layer if any(each is layer for each in layers.values()) else layers.get(place, layer)

    def part(self, layer: Layer, weight: torch.Tensor, place: int) -> Layer:
        """Replace the layer of ``weight`` by a clone of ``layer`` with a copy of its own; the old copy stays with
        another weight."""
        with self._lock:
            layers = self._layers_of(layer.kind)
            parted: dict[int, Layer] = {}
            for number, each in {**layers.get(weak_key(weight), {}), place: layer}.items():
                parted[number] = each.parted(next(iter(parted.values()), None))
            layers[weak_key(weight)] = parted
            return parted[place]

    def _layers_of(self, kind: tuple[Any, ...]) -> MutableMapping[WeakKey, dict[int, Layer]]:
        return self._layers.setdefault(kind, weakref.WeakKeyDictionary())

    def forget_weights(self, weights: Sequence[torch.Tensor]) -> int:
        """Mark the 8-bit copies of ``weights`` as stale; returns how many there were."""
        with self._lock:
            given = list(map(weak_key, weights))
            known = [layers[weight] for layers in self._layers.values() for weight in given if weight in layers]
            found = {layer.copy for places in known for layer in places.values()}
        for copy in found:
            copy.forget()
        return sum(copy.weight is not None for copy in found)

    def clear(self) -> None:
        """Forget every layer."""
        with self._lock:
            self._layers.clear()


known_layers = LayerRegistry()
