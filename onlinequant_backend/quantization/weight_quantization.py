"""Float weights to 8-bit weights and their scales."""

from __future__ import annotations

import torch

from ..kernels.formats import ONEDNN, Format

# Values of a weight that are quantized at a time: 4 MiB as float32.
_BLOCK = 2**20
# No weight is taken for smaller than this, so that scales are normal numbers.
_LEAST = torch.finfo(torch.float32).tiny * 2**20


def scale_of(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of a whole weight, a 0-d float32 power of two: rounding stays the same as with any other, and small
    changes of the weight leave it alone. Not finite if the weight is not."""
    low, high = (bound.float() for bound in torch.aminmax(weight.detach()))
    exact = torch.maximum(-low, high).clamp_(min=_LEAST) / format.weight_limit
    return torch.exp2(torch.ceil(torch.log2(exact)))


def quantize_weight(
    weight: torch.Tensor,
    format: Format = ONEDNN,
    scale_of_all: float | None = None,
    smoothing: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights and their scales: ``weight`` is about ``q * scale``.

    ``weight``: any float dtype, [N, ...]. Returns ``format.weight`` of the same shape, contiguous, and float32 scales
    as ``format.scale_of`` tells. A channel with NaN or infinity gets a scale that is not finite, so that the layer's
    output is not finite either, as in float. ``scale_of_all``: the scale of a weight that has one, if it is to be
    another than ``scale_of(weight)``. ``smoothing``: what the weight is divided by first, see ``smoothing_factors``.
    ``out``: what to write them into, in any memory format.
    """
    weight = weight.detach()
    q = torch.empty(weight.shape, dtype=format.weight, device=weight.device) if out is None else out
    desc = format.scale_of(weight.shape)
    per_tensor = desc.granularity == "tensor"
    blocks = 1 if desc.block is None else desc.shape(weight.shape)[1]
    scale = torch.empty(weight.shape[0], blocks, dtype=torch.float32, device=weight.device)
    if per_tensor:
        scale.fill_(scale_of(weight, format) if scale_of_all is None else scale_of_all)
    # A few rows at a time: they stay in the cache, and most of the time of a whole copy would go into page faults.
    rows = max(1, (_BLOCK if weight.device.type == "cpu" else 4 * _BLOCK) // weight.shape[1:].numel())
    scratch = torch.empty(min(rows, len(weight)), *weight.shape[1:], dtype=torch.float32, device=weight.device)
    for source, q_block, scale_block in zip(weight.split(rows), q.split(rows), scale.split(rows), strict=True):
        block = scratch[: len(source)].copy_(source)  # any dtype and memory format
        if smoothing is not None:
            block.div_(smoothing)
        values = block.view(len(block), blocks, -1)
        if not per_tensor:
            largest = torch.maximum(values.amax(2), values.amin(2).neg_())
            scale_block.copy_(largest.clamp_(min=_LEAST).div_(format.weight_limit))
        # No clamping: with such a scale nothing rounds to more than the limit.
        values.div_(scale_block[:, :, None])
        q_block.copy_(block if format.weight.is_floating_point else block.round_())
    finite = torch.isfinite(scale).all(1)
    if not finite.all():
        q.view(torch.uint8)[~finite] = 0
    return q, scale[0].clone() if per_tensor else scale.view(format.scale_shape(weight.shape))
