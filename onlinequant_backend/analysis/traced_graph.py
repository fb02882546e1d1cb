"""One graph as traced by Dynamo, with its constant properties."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from ..config import QuantConfig
from ..graph import LayerInfo, fx_utils, layer_nodes
from ..graph.graph_inputs import GraphInputs
from ..kernels.precision import Precision
from ..kernels.provider import Provider, provider_of
from ..passes import OBSERVE, PassContext, run_passes
from ..report.report import Report
from ..torch_internals import torch_settings
from . import graph_key


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
