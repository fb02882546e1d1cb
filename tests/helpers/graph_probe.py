"""A module's real Dynamo graph, with its op counts and its text before and after passes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from onlinequant_backend.config import QuantConfig
from onlinequant_backend.graph import LayerInfo, fx_utils, layer_nodes
from onlinequant_backend.graph.layer_info import Sensitivity
from onlinequant_backend.kernels import formats, precision
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.passes import ANALYZE, OBSERVE, PassContext, run_passes
from onlinequant_backend.quantization.layer_state import Layer
from onlinequant_backend.quantization.observation import Observation
from onlinequant_backend.quantization.weight_set import WeightSet

EIGHT_BITS = Precision("int8", "the test says so")
# What a GPU computes in, and a CPU emulates: formats without packed weights, for which there are fused kernels.
SYMMETRIC = (
    Precision("int8", "the test says so", formats.INT8),
    Precision("fp8", "the test says so", formats.FP8),
)
EVERY_LAYER: dict[str, Any] = {"conv_compute_density_threshold": 0, "linear_compute_density_threshold": 0}


def host_precision() -> Precision:
    """int8 as this machine's kernels need it: weights of 7 bits without VNNI, else of 8."""
    return precision.resolve("int8", torch.device("cpu"))


def capture(module: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """The one Dynamo graph of ``module(*inputs)`` under ``no_grad``, Dynamo's own, and what it is called with."""
    graphs: list[fx.GraphModule] = []
    calls: list[tuple[Any, ...]] = []

    def backend(graph_module: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)

        def call(*args: Any) -> Any:
            calls.append(args)
            return graph_module(*args)

        return call

    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (graph_module,), (args,) = graphs, calls
    return graph_module, args


class WithWeight(nn.Module):
    """``function(x, weight)`` with a random parameter of this shape: for calls that no torch module makes."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(*shape).to(dtype))

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        return self.function(x, self.weight, *others)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: how often each target is called (inputs count as "placeholder"), and its text."""

    counts: Counter[object]
    text: str

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> Snapshot:
        nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
        counts = Counter(node.op if node.op == "placeholder" else node.target for node in nodes)
        return cls(counts, str(graph_module.graph))


class GraphProbe:
    """A copy of the Dynamo graph of ``module(*inputs)`` for passes to work on.

    ``before`` and ``after`` are the graph around the latest ``run``. Unless ``options`` (of ``QuantConfig``) say
    otherwise, no layer is too small for 8 bit.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        *inputs: Any,
        precision: Precision = EIGHT_BITS,
        dynamic: bool = False,
        **options: Any,
    ) -> None:
        original, args = capture(module, *inputs, dynamic=dynamic)
        self.graph_module = fx_utils.copy_graph(original)
        names = [node.name for node in fx_utils.placeholders(self.graph_module)]
        self.inputs: Mapping[str, Any] = dict(zip(names, args, strict=True))
        self.context = PassContext(QuantConfig(**{**EVERY_LAYER, **options}), precision)
        self.before = self.after = Snapshot.of(self.graph_module)

    def run(self, *passes: Callable[[fx.GraphModule, PassContext], int]) -> dict[str, int]:
        """Run ``passes``; returns what ``run_passes`` does."""
        self.before = Snapshot.of(self.graph_module)
        changes = run_passes(self.graph_module, passes, self.context)
        self.after = Snapshot.of(self.graph_module)
        return changes

    def analyze(self) -> GraphProbe:
        """Run the passes that come before observing."""
        self.run(*ANALYZE)
        return self

    def assert_settled(self, *passes: Callable[[fx.GraphModule, PassContext], int]) -> None:
        """A second run of ``passes`` changes nothing and asks for no more inputs."""
        extra_inputs = list(self.context.extra_inputs)
        assert self.run(*passes) == {run.__name__: 0 for run in passes}
        assert self.after == self.before
        assert self.context.extra_inputs == extra_inputs

    def added(self, target: object) -> int:
        """How many more calls of ``target`` there are after the latest ``run``; negative for fewer."""
        return self.after.counts[target] - self.before.counts[target]

    def nodes(self, target: object) -> list[fx.Node]:
        """The nodes that call ``target``, in graph order."""
        return [node for node in self.graph_module.graph.nodes if node.target is target]

    @property
    def infos(self) -> list[LayerInfo]:
        """Every layer, in graph order."""
        return [info for _, info in layer_nodes(self.graph_module)]

    @property
    def info(self) -> LayerInfo:
        """The only layer."""
        (info,) = self.infos
        return info

    def quantized(self) -> list[str]:
        """Names of the layers that are to run in 8 bit."""
        return [info.name for info in self.infos if info.quantized]

    def set_sensitivities(self, **relative: float) -> None:
        """What observing would have measured, by layer name with "_" for "."."""
        for info in self.infos:
            info.sensitivity = Sensitivity(relative[info.name.replace(".", "_")], 0, 0)
        self.context.measured = True

    def new_layers(self) -> list[Layer]:
        """The state of every candidate, with nothing observed yet."""
        candidates = [info for info in self.infos if info.index is not None]
        return [Layer(info.geometry, self.context.precision.format, "minmax") for info in candidates]

    def weights(self) -> list[torch.Tensor]:
        """The float weight of every candidate."""
        return [self.inputs[info.weight] for info in self.infos if info.index is not None]

    @torch.no_grad()
    def call(self, *extras: Any) -> Any:
        """Run the graph eagerly with those of the captured inputs that it still takes, then ``extras``."""
        names = [node.name for node in fx_utils.placeholders(self.graph_module)]
        return self.graph_module(*(self.inputs[name] for name in names if name in self.inputs), *extras)

    @torch.no_grad()
    def observe(self) -> list[Layer]:
        """Let fresh layers see the inputs of this graph's layers, and quantize their weights."""
        layers = self.new_layers()
        observed = fx_utils.copy_graph(self.graph_module)
        run_passes(observed, OBSERVE, self.context)
        floats = self.weights()
        observed(*self.inputs.values(), Observation(layers, floats))
        for layer, weight in zip(layers, floats, strict=True):
            layer.refresh(weight)
        self.context.smoothing = _set_of(layers).smoothing()
        weights = _set_of(layers)
        self.context.merge = lambda indices: weights.merge(indices) is not None
        return layers

    def call_quantized(self, layers: Sequence[Layer]) -> Any:
        """Run a rewritten graph eagerly; ``layers`` hold what the rewriting passes asked for."""
        weights = _set_of(layers)
        return self.call(*(weights.extra(what, of) for what, of in self.context.extra_inputs))


def _set_of(layers: Sequence[Layer]) -> WeightSet:
    """The set of weights of ``layers``, as far as rewriting asks for it."""
    weights = WeightSet((), (), (), (), layout=0)
    weights.layers = layers
    return weights
