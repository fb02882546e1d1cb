"""Several linear weights merged into one, for linears that read the same tensor and can be one product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .weight_copy import Copy, Generation, copies_lock


class MergedWeight:
    """The 8-bit weights of ``copies`` in one tensor; each is still quantized separately.

    Attributes:
        copies: the merged copies in order; their ``weight`` and ``weight_scale`` become views.
        weight: [sum of N, K].
        weight_scale: float32 [sum of N], or [1] for formats with one scale per weight: then it is the largest that any
            layer needs, and NaN while any of them is not finite. Such scales are powers of two, so that rescaling a
            weight only changes its exponents.
        shares_scale: whether there is one scale for all copies.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        weights, scales = [], []
        for copy in copies:
            assert copy.weight is not None and copy.weight_scale is not None
            weights.append(copy.weight)
            scales.append(copy.weight_scale)
        self.copies = tuple(copies)
        self.shares_scale = copies[0].format.matrix_scale.granularity == "tensor"
        self._rows = [weight.shape[0] for weight in weights]
        with torch.inference_mode(False), torch.no_grad():
            self.weight = _whole(weights)
            self.weight_scale = scales[0].clone() if self.shares_scale else torch.cat(scales)
            self._hand_out()
            if not self.shares_scale:
                return
            self._needed = {copy: float(scale) for copy, scale in zip(copies, scales, strict=True)}
            self._scale = self._largest()
            for copy, needed in self._needed.items():
                _rescale(copy, needed, self._scale)
            self._show()

    def renew(self) -> None:
        """Continue in new tensors, since a call in another thread reads the old ones."""
        self.weight, self.weight_scale = self.weight.clone(), self.weight_scale.clone()
        self._hand_out()

    def _hand_out(self) -> None:
        weights = self.weight.split(self._rows)
        scales = [self.weight_scale] * len(weights) if self.shares_scale else self.weight_scale.split(self._rows)
        for copy, weight, scale in zip(self.copies, weights, scales, strict=True):
            copy.weight, copy.weight_scale, copy.merged = weight, scale, self

    def lay(self, copy: Copy, needed: float) -> float:
        """The scale to quantize ``copy`` with, whose weight now needs at least ``needed``; rescales the others to it.
        Not finite for a weight that is not finite: then the output of all layers is not finite until the weight is.
        """
        self._needed[copy] = needed
        before, scale = self._scale, self._largest()
        others = [other for other in self.copies if other is not copy] if scale != before else []
        stamps = [other.forget() for other in others]  # an interrupt may leave only some rescaled
        for other in others:
            _rescale(other, before, scale)
        self._scale = scale
        self._show()
        if scale > before:  # to a smaller scale, they must be quantized again to regain precision
            for other, stamp in zip(others, stamps, strict=True):
                other.recall(stamp)
        return scale if math.isfinite(needed) else needed

    def _largest(self) -> float:
        """The scale that fits all parts; scales that are not finite are ignored."""
        return max((scale for scale in self._needed.values() if math.isfinite(scale)), default=1.0)

    def _show(self) -> None:
        self.weight_scale.fill_(self._scale if all(map(math.isfinite, self._needed.values())) else math.nan)


def _whole(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """All rows of ``weights`` in one tensor: a view if they are consecutive parts of one storage, else a new tensor."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or weight.data_ptr() != end:
            return torch.cat([weight.view(torch.uint8) for weight in weights]).view(first.dtype)
        end += weight.nbytes
    return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1), first.storage_offset())


def _rescale(copy: Copy, old: float, new: float) -> None:
    weight = copy.weight
    assert weight is not None
    if old != new and math.isfinite(old):
        weight.copy_((weight.float() * (old / new)).to(weight.dtype))


def merged_weight(copies: Sequence[Copy]) -> MergedWeight | None:
    """The merged weight of linear layers' copies; None if one of them is part of another one already."""
    known = copies[0].merged
    if known is not None and list(known.copies) == copies:
        return known
    if copies[0].format.is_packed:  # packed weights are handles of one byte
        return None
    if len(set(copies)) < len(copies) or any(copy.merged is not None for copy in copies):
        return None
    merged = MergedWeight(copies)
    with copies_lock:
        Generation.number += 1  # compiled graphs hold the tensors that the merged one replaced
    return merged
