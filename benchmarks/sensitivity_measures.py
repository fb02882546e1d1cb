"""Ways to tell, layer by layer, how much of a model's error 8 bit would cost, and the truth to hold them against."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import LayerInfo, fx_utils, layer_nodes
from onlinequant_backend.kernels import formats, precision
from onlinequant_backend.passes import ANALYZE, OBSERVE, PassContext, run_passes
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.observation import Observation
from onlinequant_backend.selection.sensitivity import estimate_by_gradient, measure_end_to_end

_ADDS = (operator.add, operator.iadd, torch.add)

_GRADIENT = "squared error x squared gradient (gradient)"

# By layer name, by measure.
Measures = dict[str, dict[str, float]]


class Observed:
    """A model's graph with its layers calibrated on one call.

    Attributes:
        graph_module, args: the graph as Dynamo traced it, and the call.
        layers, infos: of everything that could be in 8 bit.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        config = QuantConfig(**options, conv_compute_density_threshold=0, linear_compute_density_threshold=0)
        traced, self.args = _traced(model, inputs)
        device = next(model.parameters()).device
        context = PassContext(config, precision.resolve(config.precision, device))
        self.graph_module = fx_utils.copy_graph(traced)
        run_passes(self.graph_module, ANALYZE, context)
        found = [(node, info) for node, info in layer_nodes(self.graph_module) if info.index is not None]
        self.infos: list[LayerInfo] = [info for _, info in found]
        self._indices = {node: index for index, (node, _) in enumerate(found)}
        method = config.calibration_method
        self.layers = [Layer(info.geometry, context.precision.format, method, device) for info in self.infos]
        self._observing = fx_utils.copy_graph(self.graph_module)
        run_passes(self._observing, OBSERVE, context)
        self._calibrate()

    @torch.no_grad()
    def _calibrate(self) -> None:
        names = [node.name for node in fx_utils.placeholders(self.graph_module)]
        weights = [dict(zip(names, self.args, strict=True))[info.weight] for info in self.infos]
        kept = range(len(self.layers))
        self.result = self._observing(*self.args, Observation(self.layers, weights, compares=True, kept=kept))
        for layer in self.layers:
            layer.freeze()

    def index(self, node: fx.Node) -> int | None:
        """Which layer a node of the graph is."""
        return self._indices.get(node)

    def by_gradient(self) -> dict[str, float]:
        """What ``sensitivity="gradient"`` makes of each layer's squared error."""
        if not estimate_by_gradient(self._observing, self.args, self.layers):
            raise RuntimeError("there are no gradients; set the log level of 'onlinequant' to INFO to see why")
        found = zip(self.infos, self.layers, strict=True)
        return {info.name: layer.sensitivity.mse for info, layer in found if layer.sensitivity is not None}

    def end_to_end(self, every: int) -> dict[str, float]:
        """The truth for one layer of so many: the mean squared error of the model's output with it alone in 8 bit."""
        chosen = range(0, len(self.layers), every)
        layers = [layer if index in chosen else _SKIPPED for index, layer in enumerate(self.layers)]
        measure_end_to_end(self._observing, self.args, layers, self.infos, self.result)
        errors = {self.infos[index].name: self.layers[index].sensitivity for index in chosen}
        return {name: error.mse for name, error in errors.items() if error is not None}


_SKIPPED = Layer(None, formats.FP8, "minmax")  # has observed nothing, so it is not measured


def measure(observed: Observed) -> Measures:
    """Everything but the truth."""
    pass_ = _Pass(observed)
    with torch.no_grad():
        pass_.run(*observed.args)
    estimates = observed.by_gradient()
    return {name: {**_figures(seen), _GRADIENT: estimates[name]} for name, seen in pass_.seen.items()}


def _figures(seen: Mapping[str, float]) -> dict[str, float]:
    mse, relative = seen["mse"], seen["mse"] / max(seen["mean square"], 1e-30)
    return {
        "mean error / mean output (local)": seen["mae"] / max(seen["magnitude"], 1e-30),
        "squared error": mse,
        "squared error, summed": mse * seen["count"],
        "squared error / squared output": relative,
        "the same x share of the residual sum": relative * seen.get("share", 1.0),
    }


class _Pass(fx.Interpreter):
    """Runs a graph, and takes note of each layer's own error."""

    def __init__(self, observed: Observed) -> None:
        super().__init__(observed.graph_module)
        self.seen: dict[str, dict[str, float]] = {}
        self._observed = observed
        self._sums = _residual_sums(observed)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        index = self._observed.index(n)
        if index is not None:
            self._see_layer(n, index, result)
        for layer, branch in self._sums.get(n, ()):
            self.seen[layer]["share"] = _mean_square(self.env[branch]) / _mean_square(result)
        return result

    def _see_layer(self, node: fx.Node, index: int, y: torch.Tensor) -> None:
        info, layer = self._observed.infos[index], self._observed.layers[index]
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        expected = y.float()
        error = layer.quantized_output(args[0], bias, y).float() - expected
        self.seen[info.name] = {
            "mse": _mean_square(error),
            "mae": float(error.abs().mean()),
            "magnitude": float(expected.abs().mean()),
            "mean square": _mean_square(expected),
            "count": expected.numel(),
        }


def _mean_square(values: torch.Tensor) -> float:
    return float(values.float().square().mean())


def _residual_sums(observed: Observed) -> dict[fx.Node, list[tuple[str, fx.Node]]]:
    """Each sum of two tensors of a shape, with the layers whose errors first meet another branch there, and the term
    that they are a part of."""
    sums: dict[fx.Node, list[tuple[str, fx.Node]]] = {}
    for node in observed.graph_module.graph.nodes:
        index = observed.index(node)
        found = None if index is None else _next_sum(node)
        if found is not None:
            sums.setdefault(found[0], []).append((observed.infos[index or 0].name, found[1]))
    return sums


def _next_sum(layer: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The first sum after a layer, one of whose terms does not depend on it, and the other term."""
    dependent = {layer}
    node = layer.next
    while node.op != "output":
        terms = [term for term in node.all_input_nodes if term in dependent]
        if terms:
            dependent.add(node)
            shapes = [getattr(term.meta.get("example_value"), "shape", None) for term in node.all_input_nodes]
            if node.target in _ADDS and len(shapes) == 2 and len(terms) == 1 and shapes[0] == shapes[1]:
                return node, terms[0]
        node = node.next
    return None


def _traced(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[fx.GraphModule, Sequence[Any]]:
    """Dynamo's graph of a call, and what the graph is called with."""
    seen: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def backend(graph_module: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append((graph_module, args))
            return graph_module(*args)

        return call

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    ((graph_module, args),) = seen
    return graph_module, args
