"""What a cache entry is found by.

A key is 64 hex digits, four parts of 16 each, so that entries that may share something have equal parts:

========  ========================================================================================
portable  the layers with their geometry, what is computed between them, and how they are calibrated: the same on
          every machine and at every size
weights   a fingerprint of the parameters: two checkpoints of one architecture never share an entry
machine   this package's sources, torch, triton, and what the device can do
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
# Values of each parameter that its fingerprint reads, evenly spread. Training or merging moves nearly all of them.
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
    """The key of ``graph_module``, which was traced in this ``state`` and whose ``operations_digest`` this is, with
    weights of this ``fingerprint``, of which ``infos`` may be quantized."""
    return (
        _part(_portable(infos, operations_part, config, precision))
        + weights
        + _part(_machine(precision, device))
        + _part(_graph(graph_module, config, state))
    )


def operations_digest(graph_module: fx.GraphModule) -> str:
    """16 hex digits of what ``graph_module`` computes: equal at all sizes, and in all processes."""
    return _part(operations.text(graph_module))


def weights_part(key: str) -> str:
    """The ``fingerprint`` in a key."""
    return key[_PART : 2 * _PART]


def machine_part(key: str) -> str:
    """What is equal in the keys of one machine, with one version of everything."""
    return key[2 * _PART : 3 * _PART]


def _part(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_PART]


def _portable(infos: Sequence[LayerInfo], operations_part: str, config: QuantConfig, precision: Precision) -> str:
    layers = [(info.name, info.kind, info.weight_shape, repr(info.geometry)) for info in infos]
    # A zero point means nothing where activations are symmetric: int8 on CPUs and on GPUs are calibrated apart.
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
    for views in samples.values():  # one copy from the device for each kind, not one for each parameter
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
    """Equal for graphs of one process that do the same in the same way; None for one that cannot be compared by text.

    Dynamo traces again when anything changes that the code has looked at, a dict's length, say; it may find the same.
    """
    lines = [repr(config.to_dict()), precision.name, str(device), torch_settings.GlobalState.now().guarded]
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):  # values that the text does not show
            return None
        # As it is, not by its name: functions that one function has made share theirs.
        called = node.target if isinstance(node.target, str) else id(node.target)
        lines.append(f"{node.name} {node.op} {called} {node.args} {node.kwargs}")
        if node.op == "placeholder":
            lines.append(f"{fx_utils.is_parameter(node)} {specialization.is_wrapped_float(node)} {_symbolic(node)}")
    return "\n".join(lines)


def _symbolic(node: fx.Node) -> str:
    """Unlike ``_layout``, with the names of symbols instead of the sizes that they stand for."""
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
