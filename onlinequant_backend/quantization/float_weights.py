"""Where the float weights of one call's layers are: on the GPU, on the host, or freed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence, Set

import torch

from . import host_weights
from .calibrated_layers import CalibratedLayers
from .layer_state import Layer
from .weight_copy import read_elsewhere

_log = logging.getLogger("onlinequant")


class FloatWeights(CalibratedLayers):
    """The layers of one call and where their float weights are.

    ``candidates``: for each layer, the position of its weight among the call's parameters.

    Attributes:
        selection: indices of the quantized layers; None before the selection.
        hostable: indices of the layers whose float weights move to the host.
    """

    def __init__(self, layers: Sequence[Layer], candidates: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.selection: tuple[int, ...] | None = None
        self.hostable: Set[int] = frozenset()
        self._candidates = candidates

    def move_to_host(self, parameters: Sequence[torch.Tensor], indices: Iterable[int]) -> None:
        """Move the float weights of the layers at ``indices`` to the host, where that is wanted and possible, and no
        other thread may be reading them."""
        elsewhere = {layer.copy for layer in read_elsewhere()}
        copies = {index: self.layers[index].copy for index in indices if index in self.hostable}
        wanted = [i for i, copy in copies.items() if not (copy.freed or copy.read_in_float or copy in elsewhere)]
        weights = [parameters[self._candidates[index]] for index in wanted]
        try:
            host_weights.move_to_host(_of_their_own(weights, parameters))
        except host_weights.HostMemoryError as error:
            _log.warning("float weights stay on the GPU, beside their 8-bit copies: %s", error)
            self.hostable = frozenset()

    def read_in_float(self) -> None:
        """From now on the float weights of all layers stay on the GPU, whatever other graphs do with them."""
        self.hostable = frozenset()
        for layer in self.layers:
            layer.copy.read_in_float = True

    def move_to_device(self, parameters: Sequence[torch.Tensor], indices: Iterable[int]) -> None:
        """Move the float weights of the layers at ``indices`` back to the GPU."""
        host_weights.move_to_device([parameters[self._candidates[index]] for index in indices])

    def has_freed(self) -> bool:
        """Whether any layer's float weight was freed."""
        return any(layer.copy.freed for layer in self.layers)

    def check_not_freed(self, parameters: Sequence[torch.Tensor]) -> None:
        """Raise FreedWeightsError if one of ``parameters`` was freed, so that the float graph cannot run."""
        ids = set(map(id, parameters))
        for layer in self.layers:
            if layer.copy.freed and id(layer.copy.source) in ids:
                layer.copy.check_not_freed()


def _of_their_own(weights: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those of ``weights`` that are not on the host, and whose memory no other one of ``parameters`` has."""
    missing = [
        weight for weight in weights if host_weights.can_be_on_host(weight) and not host_weights.is_on_host(weight)
    ]
    if not missing:
        return []
    plain = {id(parameter): parameter for parameter in parameters if host_weights.is_plain(parameter)}
    owners = Counter(parameter.data_ptr() for parameter in plain.values())
    return [weight for weight in missing if owners[weight.data_ptr()] == 1]
