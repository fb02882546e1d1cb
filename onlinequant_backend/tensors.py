"""Helpers for tensors: samples of values, memory layouts, distances."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def sample(tensor: torch.Tensor, number: int) -> torch.Tensor:
    """At most ``number`` values of ``tensor``: a view, unless there are gaps in the tensor's memory."""
    flat = tensor.detach()
    order = sorted(range(flat.dim()), key=flat.stride, reverse=True)
    flat = flat.permute(order).reshape(-1)  # in memory order: a whole copy of each channels-last weight takes seconds
    step = max(1, math.ceil(flat.numel() / number)) | 1  # odd, so that it visits every channel
    return flat[::step]


# The channels-last format by number of dimensions; other numbers have none.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """As ``operator.itemgetter``, the fastest way, but returns a tuple for any number of positions."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda sequence: tuple(sequence[position] for position in positions)


def relative_error(result: Any, expected: Any) -> float:
    """``||result - expected|| / ||expected||`` over all float tensors in two results of one graph; NaN if any is."""
    flat = flat_floats(expected)
    return float((flat_floats(result) - flat).norm() / flat.norm())


def flat_floats(result: Any) -> torch.Tensor:
    """All values of the floating-point tensors in a result of any structure, as one float32 vector."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return torch.cat([tensor.float().flatten() for tensor in tensors if tensor.is_floating_point()])


def clone_preserving_strides(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same memory layout, including gaps and expanded dimensions."""
    from torch._prims_common import clone_preserve_strides

    copy: torch.Tensor = clone_preserve_strides(tensor)
    return copy


def plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """``tensor`` itself, or the plain tensors that a quantized one consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_tensors(getattr(tensor, name))]


def extent(tensor: torch.Tensor) -> int:
    """The number of elements from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def numbered(device: int | str | torch.device) -> torch.device:
    """``device`` as tensors name it: with a number if it is a GPU, and without one if it is the CPU."""
    known = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if known.type == "cuda" and known.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if known.type == "cpu" else known
