"""8-bit copies of a model's weights, and whether the float weights have changed since.

A ``Layer`` is the state of one weight in this process: what was observed of its inputs, and its 8-bit copy. Layers live
in a registry keyed by the weight's identity, because one model reaches the backend as several graphs (another shape,
``no_grad`` then ``inference_mode``), and all of them must share one calibration.

A ``WeightSet`` is the layers that one call of one graph brings along. It notices every way in which a weight can change
under a compiled graph, none of which Dynamo guards against:

==============================================  ===========  ==========  =========
change                                          same object  _version    data_ptr
==============================================  ===========  ==========  =========
``w.add_``, ``copy_``, ``load_state_dict``      yes          moves       same
``w.data = new``                                yes          same        moves
a new Parameter (ComfyUI's LoRA)                no
``w.data += d``, ``w.data.copy_`` (PEFT)        yes          same        same
==============================================  ===========  ==========  =========

The last one can only be seen in the values: a few of each weight are compared at every call.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import ops
from .calibration import ActivationRange, freeze
from .kernels import cpu

if TYPE_CHECKING:
    from .passes.layer import ConvGeometry

# Values compared of each weight at every call. Merging a LoRA moves nearly every value of many weights at once.
_SAMPLES = 2
_pointer_of = torch.Tensor.data_ptr
_version_of: Callable[[torch.Tensor], int] = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``operator.itemgetter``, the quickest there is, that gives a tuple for any number of positions."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda sequence: tuple(sequence[position] for position in positions)


@dataclasses.dataclass
class Sensitivity:
    """How far a layer's 8-bit output is from its float output: ``mae`` and ``mse``, and ``mae`` over the mean of
    the float output's magnitude."""

    relative: float
    mae: float
    mse: float


class Layer:
    """One conv or linear weight: what was observed of its inputs, and its 8-bit copy."""

    def __init__(self, geometry: ConvGeometry | None, bits: int, method: str) -> None:
        self.geometry = geometry
        self.bits = bits
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
                self._qparams = freeze(self.observed, self.bits, self.method)
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
            q, scale = quantize_weight(weight)
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
        registry.generation += 1

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

    def quantized_output(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        """The layer's 8-bit output for float input ``x``, in the dtype of its float output ``y``."""
        if self.weight is None or self.weight_scale is None:
            return y
        qparams = self.qparams
        xq = ops.quantize(x, qparams, self.bits, self.geometry is not None)
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


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit weights, one scale for each output channel: ``weight`` is about ``q * scale``.

    ``weight``: any float dtype, [N, ...]. Returns int8 of the same shape in [-127, 127] and float32 [N]. A channel
    with NaN or infinity gets a scale that is not finite, so that the layer's output is not finite either, as in float.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * 2**20) / 127
    q = torch.clamp(torch.round(rows / scale[:, None]), -127, 127).nan_to_num(0).to(torch.int8)
    return q.reshape(weight.shape), scale


def _sample_view(weight: torch.Tensor) -> torch.Tensor:
    """A view of a few of a weight's values, from the middle of its parts; never a copy."""
    flat = weight.detach()
    if flat.is_contiguous() or flat.is_contiguous(memory_format=_channels_last(flat)):
        flat = flat.as_strided((flat.numel(),), (1,))
    else:
        for size in flat.shape[1:]:
            flat = flat.select(1, size // 2)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[step // 2 :: step][:_SAMPLES]


def _channels_last(tensor: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return formats.get(tensor.dim(), torch.contiguous_format)


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


class WeightSet:
    """The weights that one call brings along, their layers, and a snapshot that tells cheaply whether any has changed.

    Attributes:
        layers: one ``Layer`` for each candidate node, in the order of their indices.
        layout: stands for the strides and dtypes of all parameters.
        selection: indices of the layers that run in 8 bit; None until they do.
        extras: the extra inputs of each compiled graph.
        ids: the parameters' identities. A set must not keep a model alive that its user has dropped, so it has no
            references; ``alive`` turns False with the first parameter that dies, since identities may then recur.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], candidates: Sequence[int], layers: Sequence[Layer], layout: int
    ) -> None:
        self.layers = layers
        self.layout = layout
        self.selection: tuple[int, ...] | None = None
        self.extras: dict[object, tuple[torch.Tensor, ...]] = {}
        self.ids = list(map(id, parameters))
        self.alive = True
        self._candidates = candidates
        self._guards = [weakref.ref(parameter, self._expire) for parameter in parameters]

    def _expire(self, _guard: object) -> None:
        self.alive = False

    def overlap(self, parameters: Sequence[torch.Tensor]) -> int:
        """How many of a call's parameters this set knows already."""
        return sum(guard() is parameter for guard, parameter in zip(self._guards, parameters, strict=True))

    def is_dead(self) -> bool:
        """Whether no parameter is left."""
        return all(guard() is None for guard in self._guards)

    def calls(self) -> int:
        """How many calls every layer has been observed for."""
        return min(layer.calls for layer in self.layers)

    def count_call(self) -> None:
        """Count one observed call."""
        for layer in set(self.layers):
            layer.calls += 1

    def quantize(self, parameters: Sequence[torch.Tensor], indices: Sequence[int]) -> int:
        """Bring the 8-bit copies of the layers at ``indices`` up to date; returns how many were not."""
        changed = 0
        for index in indices:
            changed += self.layers[index].refresh(parameters[self._candidates[index]])
        return changed

    def select(self, parameters: Sequence[torch.Tensor], indices: Sequence[int]) -> None:
        """Run the layers at ``indices`` in 8 bit from now on; the others' 8-bit copies are freed."""
        self.quantize(parameters, indices)
        for index in indices:
            self.layers[index].in_use = True
        for layer in self.layers:
            if layer.refusal() is None:
                _ = layer.qparams  # frozen now, so that the histograms can go
        for layer in self.layers:
            layer.observed.histograms.clear()
            layer.drop_copy()
        self.selection = tuple(indices)
        self._take_snapshot(parameters)

    def follow(self, parameters: Sequence[torch.Tensor]) -> int:
        """Quantize what has changed again, in place; returns how many layers that were."""
        assert self.selection is not None
        changed = self.quantize(parameters, self.selection)
        self._take_snapshot(parameters)
        return changed

    def _take_snapshot(self, parameters: Sequence[torch.Tensor]) -> None:
        assert self.selection is not None
        positions = [self._candidates[index] for index in self.selection]
        self._watched = getter(positions)
        # Inference tensors count no versions.
        self._versioned = getter([i for i in positions if not parameters[i].is_inference()])
        watched = self._watched(parameters)
        self._versions = list(map(_version_of, self._versioned(parameters)))
        self._pointers = list(map(_pointer_of, watched))
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for weight in watched:
            alike.setdefault((weight.dtype, weight.device), []).append(_sample_view(weight))
        with torch.inference_mode(False):
            self._samples = [(views, torch.cat(views)) for views in alike.values()]
        self._generation = registry.generation

    def is_current(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether every 8-bit copy still is what these parameters, identical to the set's, would give.

        Runs at every call, so it is quick. Another set may have quantized a layer that both share for other weights:
        the generation tells.
        """
        if self._generation != registry.generation:
            return False
        if list(map(_version_of, self._versioned(parameters))) != self._versions:
            return False
        if list(map(_pointer_of, self._watched(parameters))) != self._pointers:
            return False
        return all(torch.equal(torch.cat(views), values) for views, values in self._samples)


class Registry:
    """Every layer of this process, by weight and by what its state depends on.

    ``generation`` moves whenever any 8-bit copy is made or marked as stale.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._layers: dict[tuple[object, ...], WeakIdKeyDictionary] = {}

    def layer(
        self, weight: torch.Tensor, geometry: ConvGeometry | None, bits: int, method: str, old: Layer | None = None
    ) -> Layer:
        """The layer of ``weight``. Where there is none, ``weight`` takes over ``old``, the layer of the weight
        whose place in the model it has taken, or else gets a new one."""
        layers = self._layers.setdefault((geometry, bits, method), WeakIdKeyDictionary())
        if weight not in layers:
            layers[weight] = old or Layer(geometry, bits, method)
        found: Layer = layers[weight]
        return found

    def forget_weights(self, weights: Sequence[torch.Tensor]) -> int:
        """Mark the 8-bit copies of ``weights`` as stale; returns how many there were."""
        found = [layers[weight] for layers in self._layers.values() for weight in weights if weight in layers]
        self.generation += 1
        for layer in found:
            layer.forget()
        return sum(layer.weight is not None for layer in found)

    def clear(self) -> None:
        """Forget every layer."""
        self._layers.clear()


registry = Registry()
