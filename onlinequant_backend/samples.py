"""A few of a tensor's values, evenly spread over its memory."""

from __future__ import annotations

import math

import torch


def sample(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """At most ``number`` values of ``tensor``: a view, unless there are gaps in the tensor's memory."""
    flat = tensor.detach()
    order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
    flat = flat.permute(order).reshape(-1)  # in memory order: a whole copy of each channels-last weight takes seconds
    step = max(1, math.ceil(flat.numel() / number)) | 1  # odd, so that it visits every channel
    return flat[::step]
