"""One graph as traced by Dynamo, with its constant properties."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ..config import QuantConfig
from ..graph import AttentionInfo, LayerInfo, fx_utils, info_of, layer_nodes
from ..graph.attention_info import attention_nodes
from ..graph.graph_inputs import GraphInputs
from ..graph.layer_info import is_cast
from ..kernels.precision import Precision
from ..kernels.provider import Provider, provider_of
from ..passes import OBSERVE, PassContext, run_passes
from ..passes.stream_weights import stream_weights
from ..quantization import host_weights
from ..quantization.weight_streaming import streaming
from ..report.report import Report
from ..torch_internals import torch_settings
from . import graph_key

# The floating-point operations for each byte of weights that take longer than to copy it from the host: about 12,000 on
# an H200 with PCIe 5.0. SDXL has 2,500 of them, SVD and Wan have more than 20,000.
_HIDDEN = 16_000


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """A float graph whose layers have been named and measured.

    Attributes:
        module: the graph.
        config: the user's options.
        precision: the formats to which these resolve on this device.
        device: the device on which the graph runs.
        report: the graph's report.
        state: the state of the process and the thread when it was traced.
    """

    module: fx.GraphModule
    config: QuantConfig
    precision: Precision
    device: torch.device
    report: Report
    state: torch_settings.GlobalState = field(default_factory=torch_settings.GlobalState.now)

    @functools.cached_property
    def inputs(self) -> GraphInputs:
        """Its inputs, classified."""
        return GraphInputs.of(self.module)

    @functools.cached_property
    def provider(self) -> Provider:
        """The kernels that its 8-bit ops run."""
        return provider_of(self.precision.format, self.device)

    @functools.cached_property
    def infos(self) -> list[LayerInfo]:
        """Its layers that may be quantized, by their indices."""
        return [info for _, info in layer_nodes(self.module) if info.index is not None]

    @functools.cached_property
    def attention(self) -> dict[str, AttentionInfo]:
        """Its attention, by name."""
        return {info.name: info for _, info in attention_nodes(self.module)}

    @functools.cached_property
    def operations(self) -> str:
        """Identifies its operations; see ``graph_key.operations_digest``."""
        return graph_key.operations_digest(self.module)

    @functools.cached_property
    def may_repeat(self) -> bool:
        """Whether a call may be repeated: the graph does not write in place."""
        return not any(map(fx_utils.writes_in_place, self.module.graph.nodes))

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether two calls with the same inputs give different results."""
        return any(map(fx_utils.is_random, self.module.graph.nodes))

    @functools.cached_property
    def observed(self) -> fx.GraphModule:
        """A copy with observers; not needed if an earlier process has observed."""
        observed = fx_utils.copy_graph(self.module)
        run_passes(observed, OBSERVE, PassContext(self.config, self.precision))
        return observed

    @functools.cached_property
    def _streamed(self) -> fx.GraphModule:
        streamed = fx_utils.copy_graph(self.module)
        run_passes(streamed, (stream_weights,), PassContext(self.config, self.precision))
        return streamed

    def in_float(self, args: Sequence[Any]) -> Any:
        """The float result of a call."""
        if host_weights.are_any_on_host():
            parameters = self.inputs.take_parameters(args)
            if any(map(host_weights.is_on_host, parameters)):
                with streaming():
                    return self._streamed(*args)
        return self.module(*args)

    @functools.cached_property
    def weights_of_layers_only(self) -> frozenset[str]:
        """The names of the placeholders of weights that only layers read that may be quantized."""
        nodes = {node.name: node for node in fx_utils.placeholders(self.module)}
        return frozenset(name for info in self.infos if _is_read_by_layers_only(nodes[name := info.weight]))

    @property
    def keeps_weights_on_host(self) -> bool:
        """Whether float weights with 8-bit copies move to the host."""
        return self.config.float_weights != "device" and host_weights.supports(self.device)

    @functools.cached_property
    def streams_while_observing(self) -> bool:
        """Whether float weights are on the host from the first call on: if that is wanted, or takes no time."""
        weights = {info.weight: math.prod(info.weight_shape) * info.dtype.itemsize for info in self.infos}
        takes_no_time = sum(info.flops for info in self.infos) >= _HIDDEN * sum(weights.values())
        return self.config.float_weights == "host" or takes_no_time


def _is_read_by_layers_only(weight: fx.Node) -> bool:
    return all(_is_read_by_layers_only(user) if is_cast(user) else _may_be_quantized(user) for user in weight.users)


def _may_be_quantized(node: fx.Node) -> bool:
    info = info_of(node)
    return info is not None and info.index is not None
