"""Freeing the memory of float weights that have 8-bit copies.

A hollow weight keeps its identity, shape, strides, dtype and version, all that Dynamo guards and compiled graphs see;
its memory is a buffer of NaNs that all hollow weights of one dtype share. So nothing is recompiled, and code that still
reads the values gets NaN rather than an image that looks nearly right. Only the first few values are zero: adding to
NaN leaves no trace, and a LoRA that is merged too late must be detected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tensors import extent

# The number of zeros at the beginning of a hollow weight's memory.
CANARIES = 4


def free_values(weights: Sequence[torch.Tensor]) -> int:
    """Free the memory of ``weights``; returns its bytes minus those of the shared buffers. Memory that has other
    references (a state dict, a tied weight) stays allocated.
    """
    kinds: dict[tuple[torch.dtype, torch.device, bool], list[torch.Tensor]] = {}
    for weight in weights:
        kinds.setdefault((weight.dtype, weight.device, weight.is_inference()), []).append(weight)
    freed = 0
    for (dtype, device, is_inference), group in kinds.items():
        # An inference tensor with ordinary memory would have no version and not know it.
        with torch.inference_mode(is_inference):
            buffer = torch.full((max(map(extent, group)),), torch.nan, dtype=dtype, device=device)
            buffer[:CANARIES] = 0
        freed -= buffer.nbytes
        for weight in group:
            freed += weight.nbytes
            weight.data = buffer.as_strided(weight.shape, weight.stride())
    return freed


def sentinel_values(weight: torch.Tensor) -> torch.Tensor:
    """The view of a hollow weight whose values show whether it was written to."""
    return weight.detach().as_strided((min(CANARIES, weight.numel()),), (1,))
