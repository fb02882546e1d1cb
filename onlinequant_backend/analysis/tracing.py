"""Controls how Dynamo traces for this backend: few graphs for many sizes. By default, Dynamo traces again for nearly
every new combination of sizes: it makes only those sizes symbolic that it has seen change, unifies two that happen to
be equal, and makes a separate graph for a size of 1. So from a frame's second graph on, every size of every input is
made symbolic at once. A frame that cannot be traced like that, or only with a graph break or an unbacked size, is
traced in Dynamo's own way: no frame is traced worse than without this package.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import itertools
import logging
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.fx as fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, sym_or
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..best_effort import warn_once
from ..errors import OnlineQuantError
from ..graph import AttentionInfo, LayerInfo, dynamic_shapes, fx_utils
from ..torch_internals import dynamo_interface, inductor_interface, triton_digest

_log = logging.getLogger("onlinequant")
_T = TypeVar("_T")
Layers = MutableMapping[Any, dict[str, LayerInfo | AttentionInfo]]


class Way(enum.IntEnum):
    """How a frame is traced, in the order of the attempts: a torch operator may check whether a size is 1."""

    ALL_SIZES = 0  # all are symbolic, each with its own symbol
    LARGER_SIZES = 1  # all but those of 1
    OWN = 2  # Dynamo's own way


class _AnotherWay(dynamo_interface.UnwrappedError):
    """Raised to have the frame traced once more."""


class _Graph(NamedTuple):
    """The recorded properties of a graph that Dynamo made.

    Attributes:
        operations: the number of its operations up to the first break.
        has_unknown: whether it has unbacked numbers, which are known only when it runs.
        sizes: of its inputs, by name.
        values: other guarded values, such as flags, see ``dynamo_interface.guarded_values``.
        is_fixed: whether it is valid for these sizes only.
    """

    operations: int
    has_unknown: bool
    sizes: dict[str, torch.Size]
    values: dict[str, Any]
    is_fixed: bool


@dataclasses.dataclass
class _Frame:
    """The tracing state of one code object and one model.

    Attributes:
        seen: the sizes that Dynamo has seen for this model, separate from other models that run the same code.
        shapes: the option of this name.
        way: how it is traced from its second graph on.
        first: its first graph; None before that.
    """

    seen: dynamo_interface.SeenSizes = dataclasses.field(default_factory=dynamo_interface.SeenSizes)
    shapes: str = "auto"
    way: Way = Way.ALL_SIZES
    first: _Graph | None = None

    def next_way(self) -> Way:
        return (
            Way.OWN
            if self.first is None or self.shapes == "static" or dynamo_interface.are_shapes_static()
            else self.way
        )


class _Frames:
    """The tracing state of one code object, for all models that run it with the same options.

    Attributes:
        fixed: its graphs that are valid for their sizes only.
        layers: for each model the layers, by name, at the largest size that they were traced at.
    """

    def __init__(self) -> None:
        self.fixed: list[_Graph] = []
        self.layers: Layers = WeakIdKeyDictionary()
        self._all: list[_Frame] = []
        self._by_model: MutableMapping[Any, _Frame] = WeakIdKeyDictionary()

    def of(self, model: Any) -> _Frame:
        """The frame of a model. Each model takes two of Dynamo's graphs, a fixed one and one for all sizes. Once the
        models take half of the limit, further ones share the last frame: otherwise models with one size each would
        leave no graph for all sizes."""
        if model not in self._by_model:
            if len(self._all) < max(dynamo_interface.most_graphs() // 4, 1):
                self._all.append(_Frame())
            self._by_model[model] = self._all[-1]
        return self._by_model[model]


class _Attempt:
    """An attempt to trace in one way, in one compilation.

    Attributes:
        made_symbolic: whether this module made sizes symbolic, which may be why the attempt fails.
        graph: the graph that was passed to the backend.
    """

    def __init__(self, compilation: dynamo_interface.Compilation, frame: _Frame | None, way: Way) -> None:
        self.compilation, self.frame, self.way = compilation, frame, way
        self.made_symbolic = False
        self.graph: _Graph | None = None
        self.until_traced = contextlib.ExitStack()

    def __call__(self, trace: Callable[[], _T]) -> _T:
        before, _now.attempt = _attempt(), self
        try:
            with contextlib.ExitStack() as stack, self.until_traced:
                if self.frame is not None:
                    stack.enter_context(self.frame.seen.in_place())
                    if self.frame.shapes == "static":
                        stack.enter_context(dynamo_interface.static_tracing())
                if self.way is not Way.OWN:
                    stack.enter_context(dynamo_interface.symbolic_tracing(self._note))
                    stack.enter_context(inductor_interface.free_sizes(are_ones_free=self.way is Way.ALL_SIZES))
                    self.until_traced.enter_context(dynamo_interface.no_kernel_choice())
                result = trace()
        finally:
            _now.attempt = before
        if self.frame is not None and self.graph is not None:
            self.frame.first = self.frame.first or self.graph
            if self.graph.is_fixed:
                _frames_of(self.compilation).fixed.append(self.graph)
        return result

    def _note(self) -> None:
        self.made_symbolic = True


_now = threading.local()
_backends = WeakIdKeyDictionary()
# By code object and by the arguments of torch.compile other than the model.
_frames: MutableMapping[Any, dict[Hashable, _Frames]] = WeakIdKeyDictionary()


def follow(backend: Callable[..., Any]) -> None:
    """From now on, trace what Dynamo compiles for ``backend`` as described above."""
    _backends[backend] = True
    dynamo_interface.around_compilations(_compile, shown=OnlineQuantError)


def _attempt() -> _Attempt | None:
    """The current attempt in this thread."""
    return getattr(_now, "attempt", None)


def model_name() -> str:
    """Class of the module, or name of the function, that Dynamo is compiling right now; "graph" without Dynamo.

    The graph does not contain it: its nodes only have the modules below the root.
    """
    attempt = _attempt()
    return "graph" if attempt is None else _name(attempt.compilation)


def root() -> torch.nn.Module | None:
    """The model of which Dynamo is compiling a part right now; None if it is not a module."""
    attempt = _attempt()
    return None if attempt is None else attempt.compilation.root


def is_traced(graph_module: fx.GraphModule, shapes_option: str) -> None:
    """Called by the backend with each graph: raises to have Dynamo trace again if there is a better way."""
    attempt = _attempt()
    if attempt is None:  # called without Dynamo
        return
    attempt.until_traced.close()
    if fx_utils.unsupported_reason(graph_module) is not None:  # the sizes of such tensors are not numbers
        return
    with contextlib.suppress(TypeError):  # its type may not support weak references
        _backends[dynamo_interface.innermost_backend(attempt.compilation.backend)] = True
    frame = attempt.frame = attempt.frame or _frame(attempt.compilation)
    frame.shapes = shapes_option
    traced = _described(graph_module, attempt.compilation)
    if frame.first is None:
        if shapes_option == "dynamic" and traced.is_fixed and not dynamo_interface.are_shapes_static():
            frame.first = traced
            raise _AnotherWay
    elif attempt.way is not Way.OWN:
        is_broken = dynamo_interface.ends_in_break(graph_module) and traced.operations < frame.first.operations
        if is_broken or (traced.has_unknown and not frame.first.has_unknown):
            raise _AnotherWay(f"{'it breaks' if is_broken else 'unknown numbers'} with symbolic sizes")
    if not traced.is_fixed:
        for fixed in _frames_of(attempt.compilation).fixed:
            _leave_to(fixed, traced)
    attempt.graph = traced


@contextlib.contextmanager
def compiled_as_traced() -> Iterator[None]:
    """Within the block the backend compiles the graph: if that fails with sizes that were made symbolic, Dynamo traces
    once more."""
    try:
        yield
    except Exception as error:
        attempt = _attempt()
        if attempt is None or not attempt.made_symbolic:
            raise
        raise _AnotherWay(f"it cannot be compiled: {type(error).__name__}: {error}") from error


def largest(infos: Sequence[LayerInfo | AttentionInfo]) -> Mapping[str, LayerInfo | AttentionInfo]:
    """Each layer and attention of the model that Dynamo is compiling, by name, at the largest size that it was traced
    at so far, including ``infos``."""
    attempt = _attempt()
    known: dict[str, LayerInfo | AttentionInfo] = {}
    if attempt is not None:
        known = _frames_of(attempt.compilation).layers.setdefault(_model(attempt.compilation), known)
    for info in infos:
        if info.name not in known or info.flops > known[info.name].flops:
            known[info.name] = copy.copy(info)
    return known


def _leave_to(fixed: _Graph, traced: _Graph) -> None:
    """Keep Dynamo from using the graph that it is tracing, with symbolic sizes, for calls that ``fixed`` is valid for:
    it tries the latest graph first."""
    are_other_flags = any(traced.values.get(name, value) != value for name, value in fixed.values.items())
    if are_other_flags or fixed.sizes.keys() - traced.sizes.keys():  # or it has other modules, such as a LoRA's
        return  # its guards already separate it
    differences: dict[tuple[str, int], torch.SymInt] = {}
    for name in fixed.sizes:
        if len(traced.sizes[name]) != len(fixed.sizes[name]):
            return
        for size, known in zip(traced.sizes[name], fixed.sizes[name], strict=True):
            known = dynamo_interface.hint(known)  # a symbolic size may have become a number later in the trace
            if isinstance(size, torch.SymInt):
                differences[str(size), known] = size
            elif size != known:
                return
    if any(dynamo_interface.hint(size) != known for (_, known), size in differences.items()):
        # Evaluating it adds a guard.
        bool(sym_or(*(size != known for (_, known), size in differences.items())))


def _compile(compilation: dynamo_interface.Compilation, trace: Callable[[], _T]) -> _T:
    """Have Dynamo compile a frame, trying one way after the other."""
    if compilation.is_first:  # also after torch._dynamo.reset()
        _frames.pop(compilation.code, None)
    if not _is_ours(compilation.backend):
        return _Attempt(compilation, None, Way.OWN)(trace)
    triton_digest.begin()
    frame = _frame(compilation)
    before = frame.way
    while True:
        # With gradients the frame stays in float, and Inductor supports fewer backward graphs with symbolic sizes.
        way = Way.OWN if _needs_gradients(compilation) else frame.next_way()
        attempt = _Attempt(compilation, frame, way)
        try:
            return attempt(trace)
        except BackendCompilerFailed:
            raise
        except _AnotherWay as reason:
            if attempt.way is Way.OWN:  # the first graph of a model with "dynamic" shapes
                continue
            error: Exception = reason
        except Exception as reason:
            if not attempt.made_symbolic:
                frame.way = before  # the error is not from this module, and may be temporary
                if dynamo_interface.is_traced_too_often(reason):
                    _say_it_is_uncompiled(compilation)
                raise
            error = reason
        frame.way = Way(attempt.way + 1)
        _log.debug("%s is traced in another way: %s: %s", _name(compilation), type(error).__name__, error)


def _needs_gradients(compilation: dynamo_interface.Compilation) -> bool:
    if not torch.is_grad_enabled():
        return False
    parameters = () if compilation.root is None else compilation.root.parameters()
    return any(map(fx_utils.requires_grad, itertools.chain(parameters, tree_leaves(compilation.scope["L"]))))


def _say_it_is_uncompiled(compilation: dynamo_interface.Compilation) -> None:
    warn_once(
        f"{_name(compilation)} is uncompiled",
        "torch._dynamo.config.recompile_limit is reached: calls of %s that no graph fits run uncompiled, in float. "
        "Raise that limit, or set TORCH_LOGS=recompiles to see what differs from call to call",
        _name(compilation),
    )


def _name(compilation: dynamo_interface.Compilation) -> str:
    module = compilation.root if compilation.owner is None else compilation.owner
    if module is not None:
        return type(module).__name__
    # After a graph break, Dynamo makes a function from the rest.
    return re.sub(r"^torch_dynamo_resume_in_(.+)_at_\d+$", r"\1", compilation.code.co_name)


def _is_ours(backend: Any) -> bool:
    with contextlib.suppress(TypeError):  # it may not be hashable
        return dynamo_interface.innermost_backend(backend) in _backends
    return False


def _model(compilation: dynamo_interface.Compilation) -> Any:
    """The model that a code object is compiled for, or the code object itself if there is none. Not the module that
    runs it: Dynamo's graphs of a code object are shared by all blocks of a model."""
    return compilation.code if compilation.root is None else compilation.root


def _frames_of(compilation: dynamo_interface.Compilation) -> _Frames:
    by_options = _frames.setdefault(compilation.code, {})
    return by_options.setdefault(dynamo_interface.backend_key(compilation.backend), _Frames())


def _frame(compilation: dynamo_interface.Compilation) -> _Frame:
    return _frames_of(compilation).of(_model(compilation))


def _described(graph_module: fx.GraphModule, compilation: dynamo_interface.Compilation) -> _Graph:
    values = {node: node.meta.get("example_value") for node in graph_module.graph.nodes}
    tensors = {node: value for node, value in values.items() if isinstance(value, torch.Tensor)}
    kinds = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    return _Graph(
        # Operations on sizes occur only with symbolic sizes.
        operations=sum(node.op.startswith("call_") for node in tensors),
        has_unknown=any(isinstance(value, kinds) and bool(free_unbacked_symbols(value)) for value in values.values()),
        sizes={node.name: value.shape for node, value in tensors.items() if node.op == "placeholder"},
        values=dynamo_interface.guarded_values(compilation.scope),
        is_fixed=not dynamic_shapes.has_symbols(graph_module),
    )
