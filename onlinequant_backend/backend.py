"""The Dynamo backend: name and measure the layers, decide, observe, rewrite to 8 bit, compile with Inductor."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from . import cache, compat, graph, precision, report
from .config import QuantConfig
from .errors import OnlineQuantError
from .passes import ANALYZE, LayerInfo, PassContext, layer_nodes, run_passes
from .runtime import QuantizedGraph

_log = logging.getLogger("onlinequant")


def onlinequant(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="onlinequant", options={...})``.

    ``options`` are the fields of ``QuantConfig``. Raises a child of ``OnlineQuantError`` for options that are wrong;
    whatever else stands in the way of 8 bit leaves the graph in float, with a reason in ``reports()``.
    """
    config = QuantConfig.from_options(options, mode)
    device = _device(example_inputs)
    resolved = precision.resolve(config.precision, device)
    analyzed = graph.copy_graph(graph_module)
    run_passes(analyzed, ANALYZE, PassContext(config, resolved))
    infos = [info for _, info in layer_nodes(analyzed)]
    entry = report.Report(
        model=compat.compiled_module_name(),
        precision=resolved.name,
        precision_reason=resolved.reason,
        calibration_steps=config.calibration_steps,
        sensitivity_kind=config.sensitivity,
        config=config.to_dict(),
        key=_entry_key(analyzed, config, device),
        decisions=_decisions(infos),
    )
    report.register(entry)
    reason = _why_float(infos, resolved, example_inputs)
    if reason is not None:
        entry.phase, entry.phase_reason = "float", reason
        _log.info("%s stays in float: %s", entry.model, reason)
        return compat.compile_fx(graph_module, list(example_inputs), config.inductor_options(), outside_dynamo=False)
    entry.phase, entry.phase_reason = "calibrating", f"observing the first {config.calibration_steps} calls in float"
    return QuantizedGraph(analyzed, config, resolved, entry, _publish)


def _why_float(infos: Sequence[LayerInfo], resolved: precision.Precision, inputs: Sequence[Any]) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        return "gradients are needed and 8-bit layers have none; call the model under torch.no_grad() for 8 bit"
    if resolved.name == "float":
        return resolved.reason
    if not infos:
        return "the graph has no convolution and no linear layer"
    if not any(info.quantized for info in infos):
        return "no layer qualifies; the decisions say why"
    return None


def _publish(entry: report.Report, infos: Sequence[LayerInfo]) -> None:
    """Show how things stand in the report and, if it can be written, in ``quantization_stats.json``."""
    entry.decisions = _decisions(infos)
    try:
        root = cache.cache_directory(entry.config["cache_dir"])
        path = cache.entry_directory(root, entry.key) / "quantization_stats.json"
        entry.stats_path = str(path)
        entry.save(path)
    except (OSError, OnlineQuantError) as error:
        entry.stats_path = None
        _log.warning("cannot write the statistics: %s", error)


def _decisions(infos: Sequence[LayerInfo]) -> list[report.NodeDecision]:
    return [
        report.NodeDecision(
            name=info.name,
            kind=info.kind,
            shape=info.input_shape,
            weight_shape=info.weight_shape,
            flops=info.flops,
            bytes=info.bytes,
            density=info.density,
            sensitivity=info.sensitivity.relative if info.sensitivity else None,
            mae=info.sensitivity.mae if info.sensitivity else None,
            mse=info.sensitivity.mse if info.sensitivity else None,
            quantized=info.quantized,
            reason=info.reason,
        )
        for info in infos
    ]


def _device(inputs: Sequence[Any]) -> torch.device:
    """Where most of the graph's inputs live; a UNet's time step may lie elsewhere."""
    devices = [x.device for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 0]
    return max(set(devices), key=devices.count, default=torch.device("cpu"))


def _entry_key(graph_module: fx.GraphModule, config: QuantConfig, device: torch.device) -> str:
    """A hex digest of what decides over this graph: ops with arguments, shapes, dtypes, options, versions, device."""
    digest = hashlib.sha256()
    for node in graph_module.graph.nodes:
        value = node.meta.get("example_value")
        size = tuple(map(compat.hint, value.shape)) if isinstance(value, torch.Tensor) else ()
        dtype = value.dtype if isinstance(value, torch.Tensor) else None
        digest.update(f"{node.op} {node.target} {node.args} {node.kwargs} {size} {dtype}\n".encode())
    digest.update(f"{config.cache_key()} {torch.__version__} {device.type} {_source_digest()}".encode())
    return digest.hexdigest()


def _source_digest() -> str:
    """A digest of this package's sources: a changed pass makes a different result."""
    from . import passes

    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(passes.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
