"""The observation of the layers in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch

from .. import ops
from ..graph.attention_info import FAILED
from ..operating_system import free_memory
from .output_error import output_error

if TYPE_CHECKING:
    from ..graph import AttentionInfo
    from .layer_state import Layer


@dataclasses.dataclass
class Observation:
    """The extra input of one call of an observed graph: the layers by index, and what to observe.

    Attributes:
        layers: the state of each observed layer.
        weights: the float weight of each.
        compares: whether each layer's float output is to be compared with its 8-bit output.
        kept: indices of the layers whose 8-bit copy is kept after the comparison.
        probed: indices of the layers whose 8-bit output replaces their float output; None outside of probing, which
            does nothing else.
        refitting: indices of the frozen layers whose ranges are fitted to this call's inputs as well.
        drifted: indices of those among them whose inputs exceeded their ranges; these get a margin.
        lost: indices of those whose inputs were not finite, so that no range fits.
        gradients: by index, the sums of squared gradients of the layers' outputs; None outside of a gradient pass,
            which does nothing else.
        spared: the bytes of free memory below which a gradient pass raises MemoryError.
        attention: by name, the attention whose error in 8 bit is measured when ``compares``.
        attention_format: the format of that.
        trim: called before each layer is observed, with the bytes of its output, so that freed memory does not pile up.
    """

    layers: Sequence[Layer]
    weights: Sequence[torch.Tensor] = ()
    compares: bool = False
    kept: Container[int] = ()
    probed: Container[int] | None = None
    refitting: Container[int] = ()
    drifted: Container[int] = ()
    lost: set[int] = dataclasses.field(default_factory=set)
    gradients: MutableMapping[int, float] | None = None
    spared: float = 0
    attention: Mapping[str, AttentionInfo] = dataclasses.field(default_factory=dict)
    attention_format: str = ""
    trim: Callable[[int], None] = lambda made: None

    def see(self, index: int, first: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Record one layer's input ``x`` and output ``y``; returns ``y``, or the 8-bit output when probing. ``first``:
        index of the first layer that reads the same ``x``; both layers share its range.
        """
        self.trim(y.nbytes)
        layer = self.layers[index]
        if self.gradients is not None:
            return self._with_gradient(index, y)
        if self.probed is not None:
            return layer.quantized_output(x, bias, y) if index in self.probed else y
        if layer.frozen:
            if index in self.refitting and not layer.refit(x, index in self.drifted):
                self.lost.add(index)
            return y
        shared = self.layers[first]
        if index != first and (layer.observed is shared.observed or layer.observed.is_empty):
            layer.observed, layer.smoothing = shared.observed, shared.smoothing
        else:
            layer.observe(x, self.weights[index], turn=index)
        if self.compares and layer.range_refusal() is None:
            layer.refresh(self.weights[index])
            if layer.refusal() is None:
                layer.measure_sensitivity(x, bias, y)
            if index not in self.kept:
                layer.copy.drop()
        return y

    def see_attention(
        self, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, y: torch.Tensor
    ) -> torch.Tensor:
        """Measure what 8 bit does to the result ``y`` of attention; returns ``y``. All [batch, heads, tokens, size]."""
        info = self.attention.get(name)
        if not self.compares or info is None or self.probed is not None or self.gradients is not None:
            return y
        factor = q.shape[-1] ** -0.5 if scale is None else scale

        def quantized(part: slice) -> torch.Tensor:
            return ops.attention(q[part], k[part], v[part], factor, self.attention_format)

        try:
            info.sensitivity = output_error(quantized, y)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a GPU may lack the shared memory that it needs
            info.refuse(f"{FAILED}: {type(error).__name__}: {error}")
        return y

    def _with_gradient(self, index: int, y: torch.Tensor) -> torch.Tensor:
        if self.spared and free_memory()[0] < self.spared:
            raise MemoryError("the memory is nearly used up")
        gradients = self.gradients
        assert gradients is not None

        def add(gradient: torch.Tensor) -> None:
            gradients[index] += float(gradient.float().square().sum())

        y = y if y.requires_grad else y.detach().requires_grad_()  # nothing else requires gradients
        y.register_hook(add)
        return y


def observe(
    observation: Observation, index: int, first: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The node that ``passes.insert_observers`` inserts after a layer; see ``Observation.see``."""
    return observation.see(index, first, x, y, bias)


def observe_attention(
    observation: Observation,
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """The node that ``passes.insert_observers`` inserts after attention; see ``Observation.see_attention``."""
    return observation.see_attention(name, q, k, v, scale, y)
