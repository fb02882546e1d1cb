"""Float weights to 8-bit weights and their scales."""

from __future__ import annotations

import torch

from ..kernels.formats import ONEDNN, Format

# The number of values quantized at a time: 4 MiB as float32.
_BLOCK = 2**20
# The least magnitude assumed for a weight, so that scales are normal numbers.
_LEAST = torch.finfo(torch.float32).tiny * 2**20


def scale_of(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of a whole weight, a 0-d float32 power of two: all powers of two round equally, and small changes of
    the weight do not change it. Not finite if the weight is not."""
    values = weight.detach()
    if values.dtype.itemsize == 1:  # float8 has no aminmax, and bfloat16 has all of its values
        values = values.bfloat16()
    low, high = (bound.float() for bound in torch.aminmax(values))
    return _power_of_two(torch.maximum(-low, high).clamp_(min=_LEAST) / format.weight_limit)


def _power_of_two(least: torch.Tensor) -> torch.Tensor:
    """The power of two that is at least ``least``."""
    return torch.exp2(torch.ceil(torch.log2(least)))


def quantize_weight(
    weight: torch.Tensor,
    format: Format = ONEDNN,
    scale_of_all: float | None = None,
    smoothing: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights and their scales: ``weight`` is about ``q * scale``.

    ``weight``: any float dtype, [N, ...]. Returns ``format.weight`` of the same shape, contiguous, and float32 scales
    as defined by ``format.scale_of``. A channel with NaN or infinity gets a scale that is not finite, so that the
    layer's output is not finite either, as in float. ``scale_of_all``: for weights with one scale, the scale to use
    instead of ``scale_of(weight)``. ``smoothing``: factors by which the weight is divided first, see
    ``smoothing_factors``. ``out``: the tensor to write into, in any memory format.

    A float8 weight gets scales that are powers of two in float8 formats: then its values are not rounded again.
    """
    weight = weight.detach()
    q = torch.empty(weight.shape, dtype=format.weight, device=weight.device) if out is None else out
    desc = format.scale_of(weight.shape)
    per_tensor = desc.granularity == "tensor"
    blocks = 1 if desc.block is None else desc.shape(weight.shape)[1]
    scale = torch.empty(weight.shape[0], blocks, dtype=torch.float32, device=weight.device)
    if per_tensor:
        scale.fill_(scale_of(weight, format) if scale_of_all is None else scale_of_all)
    keeps_values = weight.dtype.itemsize == 1 and format.weight.is_floating_point
    # A few rows at a time: these stay in the CPU's cache, and a whole copy would spend most of its time on page faults.
    rows = max(1, (_BLOCK if weight.device.type == "cpu" else 4 * _BLOCK) // weight.shape[1:].numel())
    scratch = torch.empty(min(rows, len(weight)), *weight.shape[1:], dtype=torch.float32, device=weight.device)
    for source, q_block, scale_block in zip(weight.split(rows), q.split(rows), scale.split(rows), strict=True):
        block = scratch[: len(source)].copy_(source)  # any dtype and memory format
        if smoothing is not None:
            block.div_(smoothing)
        values = block.view(len(block), blocks, -1)
        if not per_tensor:
            largest = torch.maximum(values.amax(2), values.amin(2).neg_())
            exact = largest.clamp_(min=_LEAST).div_(format.weight_limit)
            scale_block.copy_(_power_of_two(exact) if keeps_values else exact)
        # No clamping: with such a scale no value rounds beyond the limit.
        values.div_(scale_block[:, :, None])
        q_block.copy_(block if format.weight.is_floating_point else block.round_())
    finite = torch.isfinite(scale).all(1)
    if not finite.all():
        q.view(torch.uint8)[~finite] = 0
    return q, scale[0].clone() if per_tensor else scale.view(format.scale_shape(weight.shape))
