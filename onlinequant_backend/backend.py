"""The Dynamo backend: with 8-bit layers, or in float if this torch lacks private parts that these need."""

from __future__ import annotations

from . import tested_torch
from .torch_internals import parts

tested_torch.announce()
if parts.why_float() is None:
    from .quantizing_backend import failures_raised, onlinequant
    from .runtime.control import copied_bytes, host_bytes, invalidate, release, reset
    from .runtime.placement import place
else:
    from .float_backend import copied_bytes, failures_raised, host_bytes, invalidate, onlinequant, place, release, reset

__all__ = ["copied_bytes", "failures_raised", "host_bytes", "invalidate", "onlinequant", "place", "release", "reset"]
