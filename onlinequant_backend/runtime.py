"""The callable that Dynamo gets: it observes, then compiles once, then runs 8 bit and watches the weights."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from . import compat, graph
from .calibration import Observation
from .config import QuantConfig
from .passes import OBSERVE, REWRITE, SELECT, LayerInfo, PassContext, layer_nodes, run_passes
from .precision import Precision
from .progress import Progress
from .report import Report, clear
from .sensitivity import measure_end_to_end
from .weights import WeightSet, getter, registry

_log = logging.getLogger("onlinequant")


class CompiledGraph:
    """One Inductor-compiled 8-bit graph for one set of concrete shapes: which arguments it takes, and which extras."""

    def __init__(
        self, function: Callable[..., Any], taken: Sequence[int], extra_inputs: Sequence[tuple[str, int]]
    ) -> None:
        self.function = function
        self._take = getter(taken)
        self._extra_inputs = extra_inputs

    def __call__(self, args: Sequence[Any], weights: WeightSet) -> Any:
        extras = weights.extras.get(self)
        if extras is None:
            extras = tuple(getattr(weights.layers[index], what) for what, index in self._extra_inputs)
            weights.extras[self] = extras
        return self.function(*self._take(args), *extras)


class QuantizedGraph:
    """What the backend returns for one Dynamo graph.

    Call by call: while any layer still lacks observed calls, run the float graph, exactly, and observe. Then select,
    rewrite and compile, once for each set of concrete shapes, without Dynamo's taking part, and from then on run that.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        config: QuantConfig,
        precision: Precision,
        report: Report,
        publish: Callable[[Report, Sequence[LayerInfo]], None],
    ) -> None:
        self._graph = graph_module
        self._config = config
        self._precision = precision
        self._report = report
        self._publish = publish
        self._observed = graph.copy_graph(graph_module)
        run_passes(self._observed, OBSERVE, PassContext(config, precision))
        self._infos = [info for _, info in layer_nodes(graph_module) if info.index is not None]
        inputs = graph.placeholders(graph_module)
        self._positions = {node.name: position for position, node in enumerate(inputs)}
        parameters = [position for position, node in enumerate(inputs) if graph.is_parameter(node)]
        self._parameters = getter(parameters)
        self._candidates = [parameters.index(self._positions[info.weight]) for info in self._infos]
        self._others = [i for i, node in enumerate(inputs) if not graph.is_parameter(node)]
        self._wrapped_floats = {i for i, node in enumerate(inputs) if graph.is_wrapped_float(node)}
        self._grad_enabled = torch.is_grad_enabled()
        self._sets: dict[int, WeightSet] = {}
        self._layouts: dict[tuple[Any, ...], int] = {}
        self._compiled: dict[tuple[Any, ...], CompiledGraph | None] = {}
        self._lock = threading.RLock()
        self._decided = False
        self._gave_up = False
        self._progress: Progress | None = None

    def __call__(self, *args: Any) -> Any:
        if self._gave_up:
            return self._graph(*args)
        if self._grad_enabled and torch.is_grad_enabled() and any(_requires_grad(arg) for arg in args):
            # Dynamo does not guard a parameter's requires_grad. 8-bit ops have no gradient; the float graph has.
            return self._graph(*args)
        try:
            parameters = self._parameters(args)
            weights = self._sets.get(id(parameters[0]))
            if weights is None or not weights.alive or weights.ids != list(map(id, parameters)):
                weights = self._find_set(parameters)
            if weights.selection is None:
                result = self._observe(args, parameters, weights)
                if weights.selection is None:
                    return result
            if not weights.is_current(parameters):
                self._follow(parameters, weights)
        except Exception as error:
            self._gave_up = True
            self._stay_in_float(error)
            return self._graph(*args)
        key = self._key(args, weights)
        compiled = self._compiled[key] if key in self._compiled else self._compile(key, args, weights)
        return self._graph(*args) if compiled is None else compiled(args, weights)

    def _key(self, args: Sequence[Any], weights: WeightSet) -> tuple[Any, ...]:
        """What a compiled graph is specialised for: shapes, strides, dtypes and numbers."""
        key: list[Any] = [weights.selection, weights.layout]
        for position in self._others:
            value = args[position]
            if not isinstance(value, torch.Tensor):
                key.append(value)
            elif position in self._wrapped_floats:
                key.append(float(value))
            else:
                key.append((value.shape, value.stride(), value.dtype))
        return tuple(key)

    def _find_set(self, parameters: Sequence[torch.Tensor]) -> WeightSet:
        """The set of a call's parameters: that of a model some of whose weights were replaced, or a new one."""
        with self._lock:
            known = max(self._sets.values(), key=lambda weights: weights.overlap(parameters), default=None)
            # A LoRA replaces weights and leaves biases and norms; another model may share a tensor or two.
            if known is not None and known.overlap(parameters) * 3 < len(parameters):
                known = None
            layers = [
                registry.layer(
                    parameters[self._candidates[index]],
                    info.geometry,
                    self._precision.weight_bits,
                    self._config.calibration_method,
                    old=known.layers[index] if known else None,
                )
                for index, info in enumerate(self._infos)
            ]
            layout = tuple((parameter.stride(), parameter.dtype) for parameter in parameters)
            number = self._layouts.setdefault(layout, len(self._layouts))
            weights = WeightSet(parameters, self._candidates, layers, number)
            self._sets = {key: old for key, old in self._sets.items() if old is not known and not old.is_dead()}
            self._sets[id(parameters[0])] = weights
            return weights

    def _observe(self, args: Sequence[Any], parameters: Sequence[torch.Tensor], weights: WeightSet) -> Any:
        """Observe one call in float and return its result. Once every layer has seen enough, select instead."""
        with self._lock:
            if weights.selection is not None:
                return None
            missing = self._config.calibration_steps - weights.calls()
            if missing <= 0:
                self._select(parameters, weights)
                return None
            self._show_progress(missing)
            last = missing == 1
            if last:
                weights.quantize(parameters, range(len(self._infos)))
            with torch.no_grad():
                result = self._observed(*args, Observation(weights.layers, measure=last))
            weights.count_call()
            self._report.calls_observed = max(self._report.calls_observed, weights.calls())
            if last and self._config.sensitivity == "end_to_end":
                measure_end_to_end(self._observed, args, weights.layers, self._infos, result)
            return result

    def _show_progress(self, missing: int) -> None:
        if self._progress is None:
            self._progress = Progress("observing", self._config.calibration_steps)
        self._progress.advance()
        if missing == 1:
            self._progress.close()
            self._progress = None

    def _select(self, parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Put the selected layers of a set in 8 bit. The graph's first set to get here decides which these are."""
        refusals = [layer.refusal() for layer in weights.layers]
        if not self._decided:
            self._decide(weights, refusals)
        weights.select(parameters, [i for i, info in enumerate(self._infos) if info.quantized and not refusals[i]])

    def _decide(self, weights: WeightSet, refusals: Sequence[str | None]) -> None:
        for info, layer in zip(self._infos, weights.layers, strict=True):
            info.sensitivity = layer.sensitivity
        named = zip(self._infos, refusals, strict=True)
        unusable = {info.name: refusal for info, refusal in named if refusal is not None}
        context = PassContext(self._config, self._precision, measured=True, unusable=unusable)
        run_passes(self._graph, SELECT, context)
        self._decided = True
        self._publish(self._report, [info for _, info in layer_nodes(self._graph)])

    def _follow(self, parameters: Sequence[torch.Tensor], weights: WeightSet) -> None:
        """Quantize changed weights again, in place."""
        with self._lock:
            start = time.perf_counter()
            changed = weights.follow(parameters)
            if changed:
                _log.info("quantized %d changed weights again in %.2f s", changed, time.perf_counter() - start)

    def _compile(self, key: tuple[Any, ...], args: Sequence[Any], weights: WeightSet) -> CompiledGraph | None:
        """Build the 8-bit graph for these shapes; None, with a reason in the report, if that fails."""
        with self._lock:
            if key in self._compiled:
                return self._compiled[key]
            self._report.phase = "compiling"
            start = time.perf_counter()
            try:
                with Progress("compiling"):
                    compiled = self._build(args, weights)
                self._report.phase = "quantized" if weights.selection else "float"
                outcome = "8-bit layers" if weights.selection else "no layer was selected; the float graph was"
                self._report.phase_reason = f"{outcome} compiled by Inductor"
            except Exception as error:
                compiled = None
                self._stay_in_float(error)
            self._report.compile_seconds += time.perf_counter() - start
            self._publish(self._report, [info for _, info in layer_nodes(self._graph)])
            self._compiled[key] = compiled
            return compiled

    def _stay_in_float(self, error: Exception) -> None:
        """Whatever went wrong, the user's model still works."""
        _log.exception("onlinequant failed, so the model goes on in float")
        self._report.phase = "float"
        self._report.phase_reason = f"it failed: {type(error).__name__}: {error}"

    def _build(self, args: Sequence[Any], weights: WeightSet) -> CompiledGraph:
        rewritten = graph.copy_graph(self._graph)
        graph.specialize(rewritten, args)
        context = PassContext(self._config, self._precision, selection=weights.selection)
        run_passes(rewritten, REWRITE, context)
        inputs = [node.name for node in graph.placeholders(rewritten)]
        taken = [self._positions[name] for name in inputs if name in self._positions]
        extras = [getattr(weights.layers[index], what) for what, index in context.extra_inputs]
        with _compilation():
            function = compat.compile_fx(
                rewritten,
                [*(args[i] for i in taken), *extras],
                {"force_layout_optimization": True, **self._config.inductor_options()},
                outside_dynamo=True,
            )
        return CompiledGraph(function, taken, context.extra_inputs)


@contextlib.contextmanager
def _compilation() -> Iterator[None]:
    """What Inductor needs outside Dynamo: a tracing context of its own (without one its caches are bypassed), and
    ordinary tensors even under ``inference_mode``."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))),
    ):
        yield


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def invalidate(module: torch.nn.Module) -> int:
    """Forget the 8-bit copies of ``module``'s weights: the next call quantizes them again.

    Only needed after a change that leaves no trace: a few values of a weight, written through ``.data``.
    Returns how many 8-bit copies were forgotten.
    """
    return registry.forget_weights(list(module.parameters()))


def reset() -> None:
    """Forget everything in this process: observed ranges, 8-bit weights and reports.

    Compiled models go on as they are; ``torch._dynamo.reset()`` makes them start anew.
    """
    registry.clear()
    clear()
