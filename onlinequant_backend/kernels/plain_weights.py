"""8-bit weights in torch's own layouts."""

from __future__ import annotations

import torch

from ..graph.conv_geometry import ConvGeometry
from ..tensors import CHANNELS_LAST
from .formats import Format


class PlainWeights:
    """The part of a ``Provider`` whose kernels read weights as torch lays them out."""

    def new_weight(self, shape: torch.Size, format: Format, device: torch.device) -> torch.Tensor:
        """Channels last, for convolutions."""
        memory_format = CHANNELS_LAST.get(len(shape), torch.contiguous_format)
        return torch.empty(shape, dtype=format.weight, device=device, memory_format=memory_format)

    def pack(self, weight: torch.Tensor, q: torch.Tensor, geometry: ConvGeometry | None) -> None:
        """Store ``q`` as it is."""
        weight.copy_(q)
