"""The Dynamo backend: name and measure the layers, decide, observe, rewrite to 8-bit ops, compile with Inductor."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from . import exclusion, progress
from .analysis import graph_key, tracing
from .analysis.traced_graph import TracedGraph
from .best_effort import warn_once
from .cache import cache_store
from .config import QuantConfig
from .graph import AttentionInfo, LayerInfo, fx_utils, operations, parameter_names
from .graph.attention_info import all_infos
from .kernels import precision
from .passes import ANALYZE, PassContext, run_passes
from .report import NodeDecision, report
from .report.phases import Phase
from .runtime import takeover
from .runtime.quantized_graph import NEEDS_GRADIENTS, QuantizedGraph, graphs
from .runtime.sampling import current_run
from .torch_internals import dynamo_interface, inductor_interface

_log = logging.getLogger("onlinequant")
_are_failures_raised: contextvars.ContextVar[bool] = contextvars.ContextVar("onlinequant_raises", default=False)


@contextlib.contextmanager
def failures_raised() -> Iterator[None]:
    """Within the block, a failed analysis raises, for callers that retry; outside it the graph stays in float."""
    token = _are_failures_raised.set(True)
    try:
        yield
    finally:
        _are_failures_raised.reset(token)


def onlinequant(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="onlinequant", options={...})``.

    ``options`` are the fields of ``QuantConfig``. Raises a subclass of ``OnlineQuantError`` for invalid options. Any
    other obstacle to quantization leaves the graph in float, with the reason in ``reports()``.
    """
    config = QuantConfig.from_options(options, mode)
    tracing.is_traced(graph_module, config.shapes)
    device = _device(example_inputs)
    resolved = precision.resolve(config.precision, device)
    analyzed, infos, reason, identity, is_known_elsewhere = _analyze(
        graph_module, example_inputs, config, resolved, device
    )
    _say_unmatched(config.exclude, infos)
    model = tracing.model_name()
    known = None if identity is None else graphs.get((model, identity))
    if known is not None:
        return known
    entry = report.Report(
        model=model,
        precision=resolved.name,
        precision_reason=resolved.reason,
        calibration_steps=config.calibration_steps,
        sensitivity_kind=config.sensitivity,
        config=config.to_dict(),
        decisions=[NodeDecision.of(info) for info in infos],
    )
    report.register(entry)
    if reason is not None:
        entry.enter(Phase.FLOAT, reason)
        if entry.lacks_requested_precision():
            warn_once(f"{model} {reason}", "%s: %s", model, entry.warnings()[0])
        else:
            _log.info("%s stays in float: %s", entry.model, reason)
        progress.tell(entry.summary(), is_result=bool(infos))
        # A user who does not wait for the quantized graph does not wait for float either; in torch.func Inductor
        # raises.
        if config.compile_in_background or dynamo_interface.is_transforming():
            return _as_it_is(graph_module, entry)
        with tracing.compiled_as_traced():
            return inductor_interface.compile_fx(
                graph_module, list(example_inputs), config.inductor_options(), outside_dynamo=False
            )
    store = cache_store.Cache.open(config.cache_dir, config.cache_size_limit)
    if not is_known_elsewhere:
        _log.info("%s: nothing is cached, since the graph calls functions of this process only", model)
        store = cache_store.Cache(None, config.cache_size_limit)
    entry.enter(Phase.OBSERVING, "observing in float")
    quantized = QuantizedGraph(TracedGraph(analyzed, config, resolved, device, entry), store)
    if identity is not None:
        graphs[model, identity] = quantized
    return quantized


class _Analysis(NamedTuple):
    """The result of analysing a graph.

    Attributes:
        module: a copy of the graph whose layers are known.
        infos: its layers and attention.
        reason: why it stays in float; None if it does not.
        identity: see ``graph_key.identity``.
        is_known_elsewhere: whether another process can identify its operations, so that they may be cached.
    """

    module: fx.GraphModule
    infos: list[LayerInfo | AttentionInfo]
    reason: str | None
    identity: str | None = None
    is_known_elsewhere: bool = False


def _analyze(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    config: QuantConfig,
    resolved: precision.Precision,
    device: torch.device,
) -> _Analysis:
    unsupported_reason = fx_utils.unsupported_reason(graph_module)
    if unsupported_reason is not None:
        return _Analysis(graph_module, [], unsupported_reason)
    try:
        analyzed = fx_utils.copy_graph(graph_module)
        parameter_names.name_parameters(analyzed, inputs, tracing.root())
        run_passes(analyzed, ANALYZE, PassContext(config, resolved, device=device, at_largest=tracing.largest))
        infos = all_infos(analyzed)
        reason = _why_float(infos, resolved, inputs)
        if reason is not None:
            for info in infos:
                if isinstance(info, AttentionInfo) and info.is_candidate:
                    info.refuse("no other layer is in 8 bit")
            return _Analysis(analyzed, infos, reason)
        identity = graph_key.identity(analyzed, config, resolved, device)
        return _Analysis(analyzed, infos, None, identity, not operations.is_of_this_process(analyzed))
    except Exception as error:  # torch can compile the graph even where the analysis fails
        if _are_failures_raised.get():
            raise
        _log.exception("onlinequant failed, so the model continues in float")
        return _Analysis(graph_module, [], f"it failed: {type(error).__name__}: {error}")


def _say_unmatched(patterns: Sequence[str], infos: Sequence[LayerInfo | AttentionInfo]) -> None:
    """Warn once of patterns of ``exclude`` that match no layer in any graph of the model so far."""
    model = tracing.root()
    names = {info.name for info in infos}.union(() if model is None else (name for name, _ in model.named_modules()))
    for pattern in exclusion.unmatched(patterns, names):
        warn_once(
            f"exclude {pattern}", "exclude: %r matches no layer of the model; report.table() has the names", pattern
        )


def _as_it_is(graph_module: fx.GraphModule, entry: report.Report) -> Callable[..., Any]:
    """The graph, not compiled, as a callable that records its calls in the current sampling run."""

    def run(*args: Any) -> Any:
        current = current_run()
        if current is not None:
            current.called.append((entry, entry.phase))
        return graph_module(*args)

    return run


def _why_float(
    found: Sequence[LayerInfo | AttentionInfo], resolved: precision.Precision, inputs: Sequence[Any]
) -> str | None:
    infos = [info for info in found if isinstance(info, LayerInfo)]  # attention alone is not worth it
    if torch.is_grad_enabled() and any(map(fx_utils.requires_grad, inputs)):
        return NEEDS_GRADIENTS
    if resolved.name == "float":
        return resolved.reason
    if not infos:
        return "the graph has no convolution and no linear layer"
    if any(info.quantized for info in infos):
        return None
    possible = [info for info in infos if info.index is not None]
    below = {info.kind: threshold for info in possible if (threshold := info.reason.partition(" is below ")[2])}
    causes = {
        "both percentages are 0: raise quantized_conv_percentage or quantized_linear_percentage": "_percentage is 0",
        f"all layers are below the thresholds ({'; '.join(below.values())}): lower these": " is below ",
        "exclude matches all layers": "excluded by ",
    }
    fitting = [text for text, part in causes.items() if possible and all(part in info.reason for info in possible)]
    return fitting[0] if fitting else "no layer qualifies: " + ", ".join(_most_common(infos))


def _most_common(infos: Sequence[LayerInfo]) -> list[str]:
    """The three most frequent reasons why layers stay in float."""
    reasons = Counter(f"{info.kind} layers: {re.sub(r'density [^ ]+', 'density', info.reason)}" for info in infos)
    return [f"{count} {reason}" for reason, count in reasons.most_common(3)]


def _device(inputs: Sequence[Any]) -> torch.device:
    """The device of most of the graph's inputs; a UNet's time step may be on another one."""
    devices = [x.device for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 0]
    return max(set(devices), key=devices.count, default=torch.device("cpu"))


tracing.follow(onlinequant)
takeover.follow(onlinequant)
