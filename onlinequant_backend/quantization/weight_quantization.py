"""Float weights to 8-bit weights and their scales."""

from __future__ import annotations

import torch

from ..kernels.formats import ONEDNN, Format
from .stored_weights import Stored, read

# The number of values quantized at a time: 4 MiB as float32.
_BLOCK = 2**20
# The least magnitude assumed for a weight, so that scales are normal numbers.
_LEAST = torch.finfo(torch.float32).tiny * 2**20


def scale_of(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of a whole weight, a 0-d float32 power of two: all powers of two round equally, and small changes of
    the weight do not change it. Not finite if the weight is not."""
    return _scale_of(read(weight), format)


def _scale_of(stored: Stored, format: Format) -> torch.Tensor:
    values, scale = stored
    if values.dtype.itemsize == 1:  # float8 has no aminmax, and bfloat16 has all values of 8 bits
        values = values.bfloat16()
    if scale is not None:
        values = values * scale
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

    ``weight``: [N, ...], any that ``stored_weights`` can read. Returns ``format.weight`` of the same shape, contiguous,
    and float32 scales as defined by ``format.scale_of``. A channel with NaN or infinity gets a scale that is not
    finite, so that the layer's output is not finite either, as in float. ``scale_of_all``: for weights with one scale,
    the scale to use instead of ``scale_of(weight)``. ``smoothing``: factors by which the weight is divided first, see
    ``smoothing_factors``. ``out``: the tensor to write into, in any memory format.

    Values that are stored in the format already are not rounded again, if the scales that they have can be kept: in
    floating formats they are only multiplied by powers of two.
    """
    values, own = read(weight)
    if scale_of_all is None and smoothing is None and own is not None and _can_keep(values, own, format):
        if values.dtype == torch.int8:
            q = values.clone() if out is None else out.copy_(values)
            return q, own.expand(len(values), 1).reshape(format.scale_shape(values.shape)).clone()
        q, scale = _quantize(Stored(values), format, None, None, out)
        return q, scale * own.view(-1)
    return _quantize(Stored(values, own), format, scale_of_all, smoothing, out)


def _can_keep(values: torch.Tensor, own: torch.Tensor, format: Format) -> bool:
    """Whether the format has these values, and as many scales."""
    scales = format.scale_of(values.shape)
    if scales.granularity == "block" or (scales.granularity == "tensor" and own.numel() > 1):
        return False
    if not bool((own > 0).all()):
        return False
    if values.dtype == torch.int8:
        is_int8 = format.weight == torch.int8 and scales.granularity == "channel"
        return is_int8 and bool(values.amin() >= -format.weight_limit) and bool(values.amax() <= format.weight_limit)
    return values.dtype == format.weight


def _quantize(
    stored: Stored,
    format: Format,
    scale_of_all: float | None,
    smoothing: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_weight`` with new scales."""
    weight, own = stored
    q = torch.empty(weight.shape, dtype=format.weight, device=weight.device) if out is None else out
    desc = format.scale_of(weight.shape)
    per_tensor = desc.granularity == "tensor"
    blocks = 1 if desc.block is None else desc.shape(weight.shape)[1]
    scale = torch.empty(weight.shape[0], blocks, dtype=torch.float32, device=weight.device)
    if per_tensor:
        scale.fill_(_scale_of(stored, format) if scale_of_all is None else scale_of_all)
    keeps_values = weight.dtype.itemsize == 1 and own is None and format.weight.is_floating_point
    # A few rows at a time: these stay in the CPU's cache, and a whole copy would spend most of its time on page faults.
    rows = max(1, (_BLOCK if weight.device.type == "cpu" else 4 * _BLOCK) // weight.shape[1:].numel())
    scratch = torch.empty(min(rows, len(weight)), *weight.shape[1:], dtype=torch.float32, device=weight.device)
    sources = weight.split(rows)
    owns = [None] * len(sources) if own is None else own.expand(len(weight), 1).split(rows)
    for source, own_block, q_block, scale_block in zip(sources, owns, q.split(rows), scale.split(rows), strict=True):
        block = scratch[: len(source)].copy_(source)  # any dtype and memory format
        if own_block is not None:
            block.mul_(own_block)
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
