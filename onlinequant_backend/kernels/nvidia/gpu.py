"""What the choice of a kernel depends on in a GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import families


class Gpu(NamedTuple):
    """One model of GPU.

    Attributes:
        name: as the driver calls it.
        processors: its multiprocessors.
        has_tma: whether it has the tensor memory accelerator, which fetches operands: compute capability 9.0 and later.
        has_gluon: whether our Gluon kernel runs on it, whose products are Hopper's alone.
    """

    name: str
    processors: int
    has_tma: bool
    has_gluon: bool


# Where there is none, as for tensors on a CPU, on which Triton's interpreter runs: kernels for any GPU.
NONE = Gpu("none", 132, has_tma=False, has_gluon=False)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that ``device`` is, whichever is the current one; the meta device, and "cuda" alone, mean that."""
    if device.index is not None:
        return _gpu(device)
    if device.type == "cpu" or not torch.cuda.is_available():
        return NONE
    return _gpu(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda" or not torch.cuda.is_available():
        return NONE
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    has_tma, has_gluon = families.without_tma(capability) is None, families.without_gluon(capability) is None
    return Gpu(properties.name, properties.multi_processor_count, has_tma, has_gluon)
