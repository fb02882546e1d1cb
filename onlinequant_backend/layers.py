"""The state of one weight in this process: what was observed of its layer's inputs, and its 8-bit copy."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from . import forks, ops
from .calibration import ActivationRange, clipped_share, freeze, widened
from .changes import Stamp
from .entry import LayerCalibration
from .errors import FreedWeightsError
from .formats import ONEDNN, Format
from .kernels import cpu
from .layout import CHANNELS_LAST
from .smoothing import smoothing_factors

if TYPE_CHECKING:
    from .merged import MergedWeight
    from .passes.layer import ConvGeometry


# Values of a weight that are quantized at a time: 4 MiB as float32.
_BLOCK = 2**20
# Values of outputs that are compared at a time, of one image at least: all of a video model's take more than its step.
_MOST_COMPARED = 2**26
# On a GPU a histogram is about 15 small kernels, so a layer has one made for the first and for one in so many calls.
_GPU_HISTOGRAMS = 8
# No weight is taken for smaller than this, so that scales are normal numbers.
_LEAST = torch.finfo(torch.float32).tiny * 2**20


class Generation:
    """Counts how often any 8-bit copy in this process was made or marked as stale."""

    number = 0


@dataclasses.dataclass
class Sensitivity:
    """How far 8 bit in one layer puts an output from the float one: ``mae``, ``mse``, and ``relative`` to the latter.

    ``of_model``: whether it is the model's output, or else the layer's own.
    """

    relative: float
    mae: float
    mse: float
    of_model: bool = False

    def __post_init__(self) -> None:
        # As precise as the cache keeps them, so that decisions do not depend on where a figure comes from.
        self.relative, self.mae, self.mse = (ctypes.c_float(x).value for x in (self.relative, self.mae, self.mse))


class Layer:
    """One conv or linear weight: what was observed of its inputs, and its 8-bit copy.

    Attributes:
        geometry, format, method, device: what its state depends on beside the weight.
        calls: how many calls its input was observed for.
        frozen: whether observing is over and the input's quantization parameters are fixed for good.
        freed: whether the float weight is gone, so that the 8-bit copy cannot be made anew.
        in_use: whether a graph runs on the 8-bit copy.
        calibrated_for: fingerprint of the weights with which the input was observed; "" where they changed meanwhile.
        lock: of a model's first layer, held while any of its graphs is calibrated.
        observed, sensitivity: what was seen.
        smoothing: what the channels of its input are multiplied by before they are quantized, and those of its weight
            divided by; None for nothing. See ``smoothing_factors``.
        clipped: the largest share of an observed call's input that the frozen range clips.
        growth: by how much the range was widened since it was frozen; 1 if it was not.
        weight, weight_scale: the 8-bit copy, or None.
        merged: what the 8-bit copy is a part of, or None.
    """

    def __init__(
        self, geometry: ConvGeometry | None, format: Format, method: str, device: torch.device | str = "cpu"
    ) -> None:
        self.geometry = geometry
        self.format = format
        self.method = method
        self.device = torch.device(device)
        self.calls = 0
        self.frozen = False
        self.freed = False
        self.in_use = False
        self.calibrated_for = ""
        self.lock = forks.rlock()
        self.observed = ActivationRange()
        self.sensitivity: Sensitivity | None = None
        self.smoothing: torch.Tensor | None = None
        self.clipped = 0.0
        self.growth = 1.0
        self.weight: torch.Tensor | None = None
        self.weight_scale: torch.Tensor | None = None
        self.merged: MergedWeight | None = None
        self._source: Callable[[], torch.Tensor | None] = lambda: None
        self._stamp: Stamp | None = None
        self._qparams: torch.Tensor | None = None
        self._ranged = False  # whether _qparams are of what was observed

    @property
    def qparams(self) -> torch.Tensor:
        """The input's quantization parameters (``ops.quantize``), fixed from what was observed at the first use."""
        if self._qparams is None or not self._ranged:
            with torch.inference_mode(False), torch.no_grad():
                self._set_qparams(freeze(self.observed, self.format, self.method))
        assert self._qparams is not None
        return self._qparams

    def _set_qparams(self, qparams: torch.Tensor) -> None:
        # Into the same tensor as before, if there is one: compiled graphs were given it.
        if self._qparams is None:
            # cuBLAS wants the scale, the last of the three, at an address that is a multiple of 16 bytes.
            self._qparams = torch.empty(5, device=qparams.device)[2:]
        self._qparams.copy_(qparams)
        self._ranged = True

    def observe(self, x: torch.Tensor, weight: torch.Tensor, turn: int = 0) -> None:
        """Take note of an input. The first one decides which channels are smoothed. ``turn``: tells layers apart whose
        histograms are not to be made all in one call."""
        # A floating format rounds small and large channels alike, and is never clipped.
        is_first, is_floating = self.observed.is_empty, self.format.activation.is_floating_point
        if is_first and not is_floating:
            with torch.inference_mode(False), torch.no_grad():
                self.smoothing = smoothing_factors(x, weight)
        every = 1 if self.device.type == "cpu" else _GPU_HISTOGRAMS
        is_due = is_first or (self.calls + turn) % every == 0
        self.observed.update(self._smoothed(x), with_histogram=is_due and not is_floating)

    def _smoothed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.smoothing is None else x * self.smoothing

    def count_call(self, fingerprint: str) -> None:
        """Count one observed call of a model whose weights have this fingerprint."""
        if self.frozen:
            return
        self.calibrated_for = fingerprint if self.calls == 0 or self.calibrated_for == fingerprint else ""
        self.calls += 1

    def freeze(self) -> None:
        """Observing is over; what was observed decides from now on."""
        if not self.frozen and self.range_refusal() is None:
            self.clipped = max(self.clipped, clipped_share(self.observed, self.qparams, self.format))
        self.frozen = True

    def widen(self, x: torch.Tensor | None = None) -> None:
        """Have the range cover ``x`` as well, the layer's input of a call, or twice what it has covered."""
        with torch.inference_mode(False), torch.no_grad():
            other = self.qparams * torch.tensor([0.5, 1, 2], device=self.qparams.device)
            seen = ActivationRange()
            if x is not None:
                seen.update(self._smoothed(x))
                if not seen.is_finite():
                    return
                other = freeze(seen, self.format, self.method)
            before = float(self.qparams[2])
            self._set_qparams(widened(self.qparams, other, self.format))
            self.growth *= float(self.qparams[2]) / before
            # What is clipped on purpose is no drift the next time.
            self.clipped = max(self.clipped, clipped_share(seen, self.qparams, self.format))

    def restore(self, saved: LayerCalibration, calls: int, calibrated_for: str) -> None:
        """Take over what another process observed."""
        with torch.inference_mode(False):
            low, high = (torch.tensor(bound, device=self.device) for bound in (saved.minimum, saved.maximum))
            self.observed = ActivationRange(low, high)
            if saved.qparams is not None:
                self._set_qparams(torch.tensor(saved.qparams, device=self.device))
            self.smoothing = None
            if saved.smoothing is not None:
                shape = [1, -1, *[1] * (len(saved.weight_shape) - 2)] if self.geometry is not None else [-1]
                self.smoothing = torch.tensor(saved.smoothing, device=self.device).view(shape)
        self.sensitivity = None if saved.sensitivity is None else Sensitivity(*saved.sensitivity)
        self.clipped = saved.clipped
        self.calls = calls
        self.calibrated_for = calibrated_for
        self.freeze()

    def start_over(self) -> None:
        """Forget what was observed: the weight now is another model's."""
        self.observed = ActivationRange()
        self.sensitivity = self.smoothing = None
        self.clipped, self.growth = 0.0, 1.0
        self.calls = 0
        self.frozen = self._ranged = False

    def save(self, name: str, kind: str, weight_shape: tuple[int, ...]) -> LayerCalibration:
        """What ``restore`` takes, of a frozen layer."""
        low, high = self.observed.minimum, self.observed.maximum
        return LayerCalibration(
            name=name,
            kind=kind,
            weight_shape=weight_shape,
            minimum=math.nan if low is None else float(low),
            maximum=math.nan if high is None else float(high),
            qparams=None if self.range_refusal() is not None else tuple(self.qparams.tolist()),
            sensitivity=None if self.sensitivity is None else dataclasses.astuple(self.sensitivity),
            clipped=self.clipped,
            smoothing=None if self.smoothing is None else tuple(self.smoothing.flatten().tolist()),
        )

    def refresh(self, weight: torch.Tensor) -> bool:
        """Quantize ``weight`` unless its 8-bit copy is up to date; returns whether it had to."""
        known = self.weight is not None and self._source() is weight
        if known and self._stamp is not None and self._stamp.matches(Stamp.of(weight)):
            return False
        self.check_not_freed()
        self.requantize(weight)
        return True

    def requantize(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` into the same 8-bit tensors as before, so that compiled graphs need not change."""
        stamp = Stamp.of(weight)  # before that: another thread may change the weight meanwhile
        with torch.inference_mode(False), torch.no_grad():
            shared = None
            if self.merged is not None and self.merged.shares_scale:
                shared = self.merged.lay(self, float(scale_of(weight, self.format)))
            q, scale = quantize_weight(weight, self.format, shared, self.smoothing)
            if self.weight is None or self.weight_scale is None:
                self.weight, self.weight_scale = self._new_copy(q), scale
            elif shared is None:
                self.weight_scale.copy_(scale)
            geometry = self.geometry
            if not self.format.is_packed:
                self.weight.copy_(q)
            elif geometry is None:
                cpu.pack(self.weight, q)
            else:
                cpu.pack(self.weight, q, geometry.stride, geometry.padding, geometry.dilation)
        self._source = weakref.ref(weight)
        self._stamp = stamp
        Generation.number += 1

    def _new_copy(self, q: torch.Tensor) -> torch.Tensor:
        if self.format.is_packed:
            return cpu.new_handle(q.shape)
        return torch.empty_like(q, memory_format=CHANNELS_LAST.get(q.dim(), torch.contiguous_format))

    def refusal(self) -> str | None:
        """What rules 8 bit out, or None."""
        if self.weight_scale is not None and not bool(torch.isfinite(self.weight_scale).all()):
            return "its weight is not finite"
        return self.range_refusal()

    def range_refusal(self) -> str | None:
        """What was observed of the input that rules 8 bit out, or None."""
        if not self.observed.is_finite():
            return "its input was not finite while observing"
        if self.observed.minimum == 0 and self.observed.maximum == 0:
            return "its input was always zero while observing, so its range is not known"
        return None

    def restamp(self, weight: torch.Tensor) -> None:
        """Take ``weight`` as it is now for what the 8-bit copy was made of."""
        self._source = weakref.ref(weight)
        self._stamp = Stamp.of(weight)

    def check_not_freed(self) -> None:
        """Raise FreedWeightsError if the float weight that an 8-bit copy would be made of is gone."""
        if self.freed:
            raise FreedWeightsError(
                "A weight was changed or asked for after its float values were given up (free_float_weights=True). "
                "Load the model again; to change weights, as a LoRA does, compile with free_float_weights=False."
            )

    def drop_copy(self) -> None:
        """Free the 8-bit copy, unless a graph runs on it."""
        if not self.in_use:
            self.weight = self.weight_scale = None

    def release(self) -> int:
        """Give up the 8-bit copy although graphs run on it; returns its bytes. What shares its memory goes as well."""
        sharing = (self,) if self.merged is None else self.merged.layers
        if any(layer.freed for layer in sharing):  # there is nothing that it could be made of again
            return 0
        freed = sum(layer.copied_bytes() for layer in sharing)
        for layer in sharing:
            layer.weight = layer.weight_scale = layer.merged = None
            layer.forget()
        return freed

    def copied_bytes(self) -> int:
        """The memory of the 8-bit copy."""
        return 0 if self.weight is None else self.weight.nbytes

    def restore_copy(self) -> None:
        """Make a copy that was released meanwhile again, of the weight that it was made of."""
        weight = self._source()
        if self.weight is None and weight is not None:
            self.requantize(weight)

    def forget(self) -> None:
        """Drop the 8-bit copy's claim to be up to date."""
        self._stamp = None
        Generation.number += 1

    def quantized_output(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        """The layer's 8-bit output for float input ``x``, in the dtype of its float output ``y``."""
        if self.weight is None or self.weight_scale is None:
            return y
        qparams = self.qparams
        xq = ops.quantize(self._smoothed(x), qparams, self.format.activation, self.geometry is not None)
        if self.geometry is None:
            return ops.linear(xq, qparams, self.weight, self.weight_scale, bias, y.dtype)
        g = self.geometry
        geometry = (list(g.stride), list(g.padding), list(g.dilation))
        return ops.conv(xq, qparams, self.weight, self.weight_scale, bias, *geometry, y.dtype)

    def measure_sensitivity(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """Compare the layer's float output ``y`` with its 8-bit output for the same input."""
        if self.geometry is None:
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        parts = min(len(y), math.ceil(y.numel() / _MOST_COMPARED))
        sums = []
        for x_part, y_part in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
            error = self.quantized_output(x_part, bias, y_part).float() - y_part
            sums.append(torch.stack([error.abs().sum(), error.square().sum(), y_part.abs().sum(dtype=torch.float32)]))
        mae, mse, magnitude = (torch.stack(sums).sum(0, dtype=torch.float64) / y.numel()).tolist()
        self.sensitivity = Sensitivity(mae / max(magnitude, torch.finfo(torch.float32).tiny), mae, mse)


def scale_of(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The scale of a whole weight, a 0-d float32 power of two: rounding stays the same as with any other, and small
    changes of the weight leave it alone. Not finite if the weight is not."""
    low, high = (bound.float() for bound in torch.aminmax(weight.detach()))
    exact = torch.maximum(-low, high).clamp_(min=_LEAST) / format.weight_limit
    return torch.exp2(torch.ceil(torch.log2(exact)))


def _has_one_scale(shape: Sequence[int], format: Format) -> bool:
    return format.linear_per_tensor and math.prod(shape[2:]) == 1


def scales_in(shape: Sequence[int], format: Format) -> int:
    """How many scales ``quantize_weight`` gives a weight of such a shape."""
    return 1 if _has_one_scale(shape, format) else shape[0]


def quantize_weight(
    weight: torch.Tensor,
    format: Format = ONEDNN,
    scale_of_all: float | None = None,
    smoothing: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights, one scale for each output channel or for all: ``weight`` is about ``q * scale``.

    ``weight``: any float dtype, [N, ...]. Returns ``format.weight`` of the same shape, contiguous, and float32 [N], or
    [1] for a linear weight (or that of a 1x1 convolution) if ``format.linear_per_tensor``. A channel with NaN or
    infinity gets a scale that is not finite, so that the layer's output is not finite either, as in float.
    ``scale_of_all``: that one scale, if it is to be another than ``scale_of(weight)``. ``smoothing``: what the weight
    is divided by first, see ``smoothing_factors``.
    """
    weight = weight.detach()
    q = torch.empty(weight.shape, dtype=format.weight, device=weight.device)
    per_tensor = _has_one_scale(weight.shape, format)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if per_tensor:
        scale.fill_(scale_of(weight, format) if scale_of_all is None else scale_of_all)
    # A few rows at a time: they stay in the cache, and most of the time of a whole copy would go into page faults.
    rows = max(1, (_BLOCK if weight.device.type == "cpu" else 64 * _BLOCK) // weight.shape[1:].numel())
    scratch = torch.empty(min(rows, len(weight)), *weight.shape[1:], dtype=torch.float32, device=weight.device)
    for source, q_block, scale_block in zip(weight.split(rows), q.split(rows), scale.split(rows), strict=True):
        block = scratch[: len(source)].copy_(source)  # any dtype and memory format
        if smoothing is not None:
            block.div_(smoothing)
        flat = block.flatten(1)
        if not per_tensor:
            largest = torch.maximum(flat.amax(1), flat.amin(1).neg_())
            scale_block.copy_(largest.clamp_(min=_LEAST).div_(format.weight_limit))
        # No clamping: with such a scale nothing rounds to more than the limit.
        flat.div_(scale_block[:, None])
        q_block.copy_(block if format.weight.is_floating_point else block.round_())
    finite = torch.isfinite(scale)
    if not finite.all():
        q.view(torch.uint8)[~finite] = 0
    return q, scale[:1].clone() if per_tensor else scale
