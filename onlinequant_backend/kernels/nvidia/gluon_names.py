"""All that the Gluon convolution takes from Triton's support of Hopper GPUs, by whichever names this Triton has.

Gluon is experimental: names change between versions. Importing this raises ImportError for what is missing.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "async_load",
    "async_store",
    "fence_async_shared",
    "mbarrier",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def _first_of(*names: str) -> Any:
    """The function of ``tma`` with the first of these names that exists."""
    for name in names:
        if hasattr(tma, name):
            return getattr(tma, name)
    raise ImportError(f"there is no tma.{names[0]}")


# The newer names come first. Triton 3.8 has both, and 3.9 keeps the older ones only to raise an error.
async_load = _first_of("async_load", "async_copy_global_to_shared")
async_store = _first_of("async_store", "async_copy_shared_to_global")
store_wait = _first_of("store_wait")
