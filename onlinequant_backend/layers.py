"""The state of one weight in this process: what was observed of its layer's inputs, and its 8-bit copy."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import ops
from .calibration import ActivationRange, freeze
from .kernels import cpu

if TYPE_CHECKING:
    from .passes.layer import ConvGeometry


class Generation:
    """Counts how often any 8-bit copy in this process was made or marked as stale."""

    number = 0


@dataclasses.dataclass
class Sensitivity:
    """How far a layer's 8-bit output is from its float output: ``mae`` and ``mse``, and ``mae`` over the mean of
    the float output's magnitude."""

    relative: float
    mae: float
    mse: float


class Layer:
    """One conv or linear weight: what was observed of its inputs, and its 8-bit copy."""

    def __init__(self, geometry: ConvGeometry | None, weight_bits: int, method: str) -> None:
        self.geometry = geometry
        self.weight_bits = weight_bits
        self.method = method
        self.calls = 0
        self.in_use = False
        self.observed = ActivationRange()
        self.sensitivity: Sensitivity | None = None
        self.weight: torch.Tensor | None = None
        self.weight_scale: torch.Tensor | None = None
        self._source: Callable[[], torch.Tensor | None] = lambda: None
        self._stamp: _Stamp | None = None
        self._qparams: torch.Tensor | None = None

    @property
    def qparams(self) -> torch.Tensor:
        """The input's quantization parameters (``ops.quantize``), frozen from what was observed at the first use."""
        if self._qparams is None:
            with torch.inference_mode(False), torch.no_grad():
                self._qparams = freeze(self.observed, ops.ACTIVATION_BITS, self.method)
        return self._qparams

    def refresh(self, weight: torch.Tensor) -> bool:
        """Quantize ``weight`` unless its 8-bit copy is up to date; returns whether it had to."""
        known = self.weight is not None and self._source() is weight
        if known and self._stamp is not None and self._stamp.matches(_Stamp.of(weight)):
            return False
        self.requantize(weight)
        return True

    def requantize(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` into the same 8-bit tensors as before, so that compiled graphs need not change."""
        with torch.inference_mode(False), torch.no_grad():
            q, scale = quantize_weight(weight, self.weight_bits)
            if self.weight is None or self.weight_scale is None:
                self.weight, self.weight_scale = cpu.new_handle(q.shape), scale
            else:
                self.weight_scale.copy_(scale)
            geometry = self.geometry
            if geometry is None:
                cpu.pack(self.weight, q)
            else:
                cpu.pack(self.weight, q, geometry.stride, geometry.padding, geometry.dilation)
        self._source = weakref.ref(weight)
        self._stamp = _Stamp.of(weight)
        Generation.number += 1

    def refusal(self) -> str | None:
        """What was observed that rules 8 bit out, or None."""
        if not self.observed.is_finite():
            return "its input was not finite while observing"
        if self.weight_scale is not None and not bool(torch.isfinite(self.weight_scale).all()):
            return "its weight is not finite"
        if self.observed.minimum == 0 and self.observed.maximum == 0:
            return "its input was always zero while observing, so its range is not known"
        return None

    def drop_copy(self) -> None:
        """Free the 8-bit copy, unless a graph runs on it."""
        if not self.in_use:
            self.weight = self.weight_scale = None

    def forget(self) -> None:
        """Drop the 8-bit copy's claim to be up to date."""
        self._stamp = None
        Generation.number += 1

    def quantized_output(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        """The layer's 8-bit output for float input ``x``, in the dtype of its float output ``y``."""
        if self.weight is None or self.weight_scale is None:
            return y
        qparams = self.qparams
        xq = ops.quantize(x, qparams, ops.ACTIVATION_BITS, self.geometry is not None)
        if self.geometry is None:
            return ops.linear(xq, qparams, self.weight, self.weight_scale, bias, y.dtype)
        g = self.geometry
        geometry = (list(g.stride), list(g.padding), list(g.dilation))
        return ops.conv(xq, qparams, self.weight, self.weight_scale, bias, *geometry, y.dtype)

    def measure_sensitivity(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Compare the layer's float output ``y`` with its 8-bit output for the same input."""
        error = self.quantized_output(x, bias, y).float() - y.float()
        mae = float(error.abs().mean())
        magnitude = max(float(y.abs().mean(dtype=torch.float32)), torch.finfo(torch.float32).tiny)
        self.sensitivity = Sensitivity(mae / magnitude, mae, float(error.square().mean()))


def quantize_weight(weight: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights, one scale for each output channel: ``weight`` is about ``q * scale``.

    ``weight``: any float dtype, [N, ...]. Returns int8 of the same shape within 127 of zero (63 for 7 bits) and float32
    [N]. A channel with NaN or infinity gets a scale that is not finite, so that the layer's output is not finite
    either, as in float.
    """
    top = 2 ** (bits - 1) - 1
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * 2**20) / top
    q = torch.clamp(torch.round(rows / scale[:, None]), -top, top).nan_to_num(0).to(torch.int8)
    return q.reshape(weight.shape), scale


@dataclasses.dataclass
class _Stamp:
    """What tells one state of a weight from another: finer than a set's snapshot, for use off the fast path."""

    pointer: int
    version: int | None
    values: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> _Stamp:
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // 4096) | 1
        version = None if weight.is_inference() else weight._version
        return cls(weight.data_ptr(), version, flat[::step].clone())

    def matches(self, other: _Stamp) -> bool:
        same_memory = (self.pointer, self.version) == (other.pointer, other.version)
        return same_memory and torch.equal(self.values, other.values)
