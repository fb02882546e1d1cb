"""The keys of cache entries.

A key is 64 hex digits, four parts of 16 each, so that entries that may share something have equal parts:

========  ========================================================================================
portable  the layers with their geometry, the operations between them, and the calibration options: equal on every
          machine and at every size
weights   a fingerprint of the parameters: two checkpoints of one architecture never share an entry
machine   this package's sources, torch, triton, and the device's capabilities
graph     the FX graph with arguments, shapes, strides and dtypes, autocast, and the options
========  ========================================================================================

Two graphs of one model, at two resolutions, differ in the last part only and share one calibration.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..cache.source_digest import source_digest
from ..config import QuantConfig
from ..graph import LayerInfo, fx_utils, operations, specialization
from ..kernels.precision import Precision
from ..kernels.provider import provider_of
from ..tensors import plain_tensors, sample
from ..torch_internals import dynamo_interface, torch_settings

_PART = 16
# The number of values, evenly spread, that a fingerprint reads of each parameter. Training or merging changes nearly
# all of them.
_SAMPLES = 1024


def entry_key(
    graph_module: fx.GraphModule,
    infos: Sequence[LayerInfo],
    weights: str,
    config: QuantConfig,
    precision: Precision,
    device: torch.device,
    state: torch_settings.GlobalState,
    operations_part: str,
) -> str:
    """The key of ``graph_module``, traced in this ``state``, with its ``operations_digest``, its weights'
    ``fingerprint``, and the ``infos`` of the layers that may be quantized."""
    return (
        _part(_portable(infos, operations_part, config, precision))
        + weights
        + _part(_machine(precision, device))
        + _part(_graph(graph_module, config, state))
    )


def operations_digest(graph_module: fx.GraphModule) -> str:
    """16 hex digits for the operations of ``graph_module``: equal at all sizes and in all processes."""
    return _part(operations.text(graph_module))


def weights_part(key: str) -> str:
    """The ``fingerprint`` in a key."""
    return key[_PART : 2 * _PART]


def machine_part(key: str) -> str:
    """The part of a key for the machine and the versions of the software."""
    return key[2 * _PART : 3 * _PART]


def _part(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_PART]


def _portable(infos: Sequence[LayerInfo], operations_part: str, config: QuantConfig, precision: Precision) -> str:
    layers = [(info.name, info.kind, info.weight_shape, repr(info.geometry)) for info in infos]
    # Symmetric activations have no zero point: int8 on CPUs and on GPUs have separate calibrations.
    stored = str(precision.format.activation)
    how = (precision.name, stored, config.calibration_method, config.calibration_steps, config.sensitivity)
    return json.dumps([layers, operations_part, how])


def fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits of names, dtypes, shapes, memory layouts and sampled values of ``parameters``."""
    digest = hashlib.sha256()
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {parameter.stride()}\n".encode())
        for tensor in plain_tensors(parameter):
            samples.setdefault((tensor.dtype, tensor.device), []).append(sample(tensor, _SAMPLES))
    for views in samples.values():  # one copy from the device per kind, not per parameter
        digest.update(torch.cat(views).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_PART]


def _machine(precision: Precision, device: torch.device) -> str:
    able = provider_of(precision.format, device).capability(device)
    return f"{source_digest()} {torch.__version__} {_triton_version()} {device.type} {able} {precision.format.name}"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _graph(graph_module: fx.GraphModule, config: QuantConfig, state: torch_settings.GlobalState) -> str:
    lines = [config.cache_key(), f"{state.default_dtype} {state.autocast}"]
    for node in graph_module.graph.nodes:
        text = f"{node.op} {_target(node.target)} {node.args} {node.kwargs} {_layout(node.meta.get('example_value'))}"
        lines.append(operations.ADDRESS.sub("", text))
    return "\n".join(lines)


def identity(
    graph_module: fx.GraphModule, config: QuantConfig, precision: Precision, device: torch.device
) -> str | None:
    """A text that is equal for equal graphs of one process; None for a graph that text does not identify. Dynamo traces
    again when any guarded value changes, such as a dict's length; the new graph may be equal.
    """
    lines = [repr(config.to_dict()), precision.name, str(device), torch_settings.GlobalState.now().guarded]
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):  # the text does not include their values
            return None
        # The object, not its name: closures of one function have equal names.
        called = node.target if isinstance(node.target, str) else id(node.target)
        lines.append(f"{node.name} {node.op} {called} {node.args} {node.kwargs}")
        if node.op == "placeholder":
            lines.append(f"{fx_utils.is_parameter(node)} {specialization.is_wrapped_float(node)} {_symbolic(node)}")
    return "\n".join(lines)


def _symbolic(node: fx.Node) -> str:
    """Unlike ``_layout``, with the names of symbols instead of their values."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    return f"{[str(size) for size in (*value.shape, *value.stride())]} {value.dtype} {value.device}"


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    return operations.name(target) or str(target)


def _layout(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        sizes, strides = (
            [dynamo_interface.hint(size) for size in numbers] for numbers in (value.shape, value.stride())
        )
        return f"{sizes} {strides} {value.dtype} {value.device.type}"
    return str(dynamo_interface.hint(value)) if isinstance(value, torch.SymInt) else ""
