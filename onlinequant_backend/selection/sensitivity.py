"""Sensitivities: how much of the whole graph's output error each layer causes. A layer's own error predicts this
poorly: for example, the error of a value that is added to a residual stream may be negligible there. Spearman's
correlation of the two over all layers is between -0.2 and 0.5; that of the gradient estimate is 0.94 and more
(``benchmarks/sensitivity.py``).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from ..graph import LayerInfo, fx_utils
from ..graph.layer_info import Sensitivity
from ..operating_system import free_memory
from ..progress import Progress
from ..quantization.layer_state import Layer
from ..quantization.observation import Observation
from ..tensors import flat_floats, relative_error

_log = logging.getLogger("onlinequant")

# A seed unlikely to be used for noise: a mixture equal to the model's own input would not be random.
_SEED = 987654321
# The share of the free memory that is not used: a system that runs out of RAM kills the process without an error.
_SPARED = 0.25


def estimate_by_gradient(observed: fx.GraphModule, args: Sequence[Any], layers: Sequence[Layer]) -> bool:
    """Replace every layer's own squared error by the one that it causes in the graph's output; False if that fails.

    To first order an error ``e`` of a layer's output becomes the error ``J e`` of the graph's. Of independent values of
    ``e`` the expected square is their mean square times that of all of ``J``, which is the expected squared gradient of
    a random mixture of the outputs (Hutchinson's estimator). So it takes one forward and one backward pass, and as much
    memory as training: without that memory, or without gradients, the layers keep their own errors.
    """
    gradients: dict[int, float] = defaultdict(float)
    try:
        observation = Observation(layers, gradients=gradients, spared=_spared_memory(args))
        with torch.inference_mode(False), torch.enable_grad():
            copies = [_without_gradient(x) if isinstance(x, torch.Tensor) else x for x in args]
            output = flat_floats(observed(*copies, observation))
            seeded = torch.Generator().manual_seed(_SEED)
            mixture = torch.randn(output.numel(), generator=seeded, dtype=torch.float32, device="cpu").to(output)
            (output * mixture).sum().backward()
        mean_square = float(output.detach().square().mean())
    except Exception as error:
        _log.info("no gradients, so layers are ranked by their own errors: %s: %s", type(error).__name__, error)
        return False
    estimates: dict[Layer, float] = defaultdict(float)
    for index, layer in enumerate(layers):  # a layer may be called more than once
        if layer.sensitivity is not None and not layer.sensitivity.of_model:
            estimates[layer] += layer.sensitivity.mse * gradients[index] / output.numel()
    if not all(map(math.isfinite, gradients.values())) or not any(gradients.values()) or not mean_square > 0:
        _log.info("the gradients are not finite, or 0, so layers are ranked by their own errors")
        return False
    for layer, mse in estimates.items():
        # The mean magnitude of normal errors.
        layer.sensitivity = Sensitivity(math.sqrt(mse / mean_square), math.sqrt(mse * 2 / math.pi), mse, of_model=True)
    return True


def _without_gradient(x: torch.Tensor) -> torch.Tensor:
    """``x`` for a backward pass: parameters must not get gradients, and autograd cannot save inference tensors."""
    return (x.clone() if x.is_inference() else x).detach()


def _spared_memory(args: Sequence[Any]) -> float:
    """The bytes that must stay free on a device that, unlike GPUs, does not raise in time when memory runs out; raises
    MemoryError if the copies of ``args`` alone would leave less."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return 0.0
    available = free_memory()[0]
    copied = sum(tensor.nbytes for tensor in tensors if tensor.is_inference())
    if available - copied < available * _SPARED:
        raise MemoryError(f"{copied / 1e9:.1f} GB of copies do not fit into {available / 1e9:.1f} GB")
    return available * _SPARED


def measure_end_to_end(
    observed: fx.GraphModule,
    args: Sequence[Any],
    layers: Sequence[Layer],
    infos: Sequence[LayerInfo],
    result: Any,
) -> int:
    """Replace every layer's sensitivity by the graph's own error with only that layer quantized.

    This is the predecessor's measure, one forward of the graph for each layer: ``mae`` and ``mse`` of the output
    against ``result``, the float output for the same ``args``. A graph that writes in place, possibly into its inputs,
    cannot safely be run again; its layers keep their local sensitivities. Returns how many layers were measured.
    """
    if any(fx_utils.writes_in_place(node) for node in observed.graph.nodes):
        _log.warning("the graph writes in place, so it cannot be run again: keeping the local sensitivities")
        return 0
    expected = flat_floats(result)
    measured = 0
    with Progress("measuring sensitivity", len(layers)) as progress, torch.no_grad():
        for index, (layer, info) in enumerate(zip(layers, infos, strict=True)):
            progress.advance(info.name)
            if layer.refusal() is not None or layer.weight is None:
                continue
            error = flat_floats(observed(*args, Observation(layers, probed=(index,)))) - expected
            mae = float(error.abs().mean())
            magnitude = max(float(expected.abs().mean()), torch.finfo(torch.float32).tiny)
            layer.sensitivity = Sensitivity(mae / magnitude, mae, float(error.square().mean()), of_model=True)
            measured += 1
    return measured


def over_budget(
    observed: fx.GraphModule,
    args: Sequence[Any],
    layers: Sequence[Layer],
    order: Sequence[int],
    max_error: float,
) -> tuple[int, float]:
    """The number of layers at the indices ``order`` that must stay in float to keep a step's error within a budget, and
    the remaining error.

    They are put into float in this order, the most sensitive first. The error is the graph's own, ``relative_error`` of
    its result for ``args`` with all other layers quantized at once; a binary search measures it a few times.
    """

    def error(number: int) -> float:
        return relative_error(observed(*args, Observation(layers, probed=frozenset(order[number:]))), expected)

    with Progress("measuring the error"), torch.no_grad():
        expected = observed(*args, Observation(layers, probed=()))
        left = error(0)
        if left <= max_error:
            return 0, left
        fewest, most = 1, len(order)
        while fewest < most:
            middle = (fewest + most) // 2
            fewest, most = (fewest, middle) if error(middle) <= max_error else (middle + 1, most)
        return fewest, error(fewest)
