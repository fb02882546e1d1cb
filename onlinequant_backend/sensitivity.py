"""How much of the whole graph's output error each layer is to blame for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from . import graph
from .calibration import Observation
from .layers import Layer, Sensitivity
from .passes import LayerInfo
from .progress import Progress

_log = logging.getLogger("onlinequant")


def measure_end_to_end(
    observed: fx.GraphModule,
    args: Sequence[Any],
    layers: Sequence[Layer],
    infos: Sequence[LayerInfo],
    result: Any,
) -> int:
    """Replace every layer's sensitivity by the graph's own error with that layer alone in 8 bit.

    This is the predecessor's measure, one forward of the graph for each layer: ``mae`` and ``mse`` of the output
    against ``result``, the float output for the same ``args``. A graph that writes in place, perhaps into its inputs,
    cannot safely be run again; its layers keep their local sensitivities. Returns how many layers were measured.
    """
    if any(graph.writes_in_place(node) for node in observed.graph.nodes):
        _log.warning("the graph writes in place, so it cannot be run again: keeping the local sensitivities")
        return 0
    expected = _flat(result)
    measured = 0
    with Progress("measuring sensitivity", len(layers)) as progress, torch.no_grad():
        for index, (layer, info) in enumerate(zip(layers, infos, strict=True)):
            progress.advance(info.name)
            if layer.refusal() is not None or layer.weight is None:
                continue
            error = _flat(observed(*args, Observation(layers, probed=(index,)))) - expected
            mae = float(error.abs().mean())
            magnitude = max(float(expected.abs().mean()), torch.finfo(torch.float32).tiny)
            layer.sensitivity = Sensitivity(mae / magnitude, mae, float(error.square().mean()))
            measured += 1
    return measured


def over_budget(
    observed: fx.GraphModule,
    args: Sequence[Any],
    layers: Sequence[Layer],
    order: Sequence[int],
    max_error: float,
) -> tuple[int, float]:
    """How many of the layers at the indices ``order`` must stay in float for a step's error to hold a budget, and the
    error that is left.

    They are given up in this order, the most sensitive first. The error is the graph's own, ``relative_error`` of its
    result for ``args`` with all others in 8 bit at once; a binary search asks for it a few times.
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


def relative_error(result: Any, expected: Any) -> float:
    """``||result - expected|| / ||expected||`` over all float tensors in two results of one graph; NaN if any is."""
    flat = _flat(expected)
    return float((_flat(result) - flat).norm() / flat.norm())


def _flat(result: Any) -> torch.Tensor:
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return torch.cat([tensor.float().flatten() for tensor in tensors if tensor.is_floating_point()])
