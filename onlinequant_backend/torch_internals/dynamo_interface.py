"""Access to Dynamo's internals."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import sys
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch._refs
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
from torch._dynamo import convert_frame, pgo
from torch._dynamo.callback import CallbackArgs, CallbackTrigger
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed, ShortenTraceback
from torch._dynamo.types import ConvertFrameReturn
from torch._dynamo.variables import builder
from torch._guards import TracingContext
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph as invoke_subgraph

from . import parts
from .torch_settings import GlobalState


class UnwrappedError(ShortenTraceback):
    """An error that Dynamo passes on to the user unchanged, instead of as ``BackendCompilerFailed``."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, first_useful_frame=None)


# The op in Dynamo's graphs for ``torch.tensor`` of numbers that are not constants.
tensor_of_numbers: Callable[..., torch.Tensor] = torch._refs.tensor


def hint(size: int | torch.SymInt) -> int:
    """The concrete size that Dynamo saw for a possibly symbolic ``size``."""
    if isinstance(size, int):
        return size
    node = size.node
    if getattr(node, "hint", None) is not None:
        return int(node.hint)
    return int(node.shape_env.size_hint(node.expr))


@dataclasses.dataclass(frozen=True, eq=False)
class Compilation:
    """One compilation of a frame by Dynamo.

    Attributes:
        code: the frame's code object.
        owner: the module whose method the code is, if it is one.
        backend: the backend that it is for.
        is_first: whether Dynamo has no earlier compilation of this code, also after a reset.
        scope: the frame's variables, by their names in Dynamo's guards.
    """

    code: types.CodeType
    owner: torch.nn.Module | None
    backend: Callable[..., Any]
    is_first: bool
    scope: dict[str, Any]

    @functools.cached_property
    def root(self) -> torch.nn.Module | None:
        """The model that the frame is a part of; None if that is not a module."""
        found = _outermost_module()  # may be falsy, like an empty ModuleList
        return self.owner if found is None else found


def around_compilations(handler: Callable[[Compilation, Callable[[], Any]], Any], shown: type[Exception]) -> None:
    """From now on call ``handler(compilation, compile)`` instead of each of Dynamo's compilations: it calls ``compile``
    once or several times and returns its result. Dynamo holds ``compile_lock`` meanwhile.

    ``shown``: errors of a backend that reach the user as they are, instead of within a ``BackendCompilerFailed``.
    """
    original = convert_frame._compile
    names = inspect.signature(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs).arguments
        owner = given["locals"].get("self")
        compilation = Compilation(
            code=given["code"],
            owner=owner if isinstance(owner, torch.nn.Module) else None,
            backend=given["compiler_fn"],
            is_first=given["compile_id"].frame_compile_id == 0,
            scope={"L": given["locals"], "G": given["globals"]},
        )
        try:
            return handler(compilation, lambda: original(*args, **kwargs))
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, shown):
                raise failure.inner_exception from failure.inner_exception.__cause__
            raise

    convert_frame._compile = compile_frame


def uncompiled_once() -> Any:
    """The result of a compilation that has this call of its frame, with all that it calls, run uncompiled, but no later
    one."""
    return ConvertFrameReturn(_FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP), apply_to_code=False)


def guarded_values(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The guarded values, other than sizes, of a graph that Dynamo has just traced, by the names of their sources:
    flags and other constants, kinds of tensors, and the state of the process and the thread."""
    found: dict[str, Any] = {"": GlobalState.now()}
    for guard in TracingContext.get().guards_context.dynamo_guards:
        if guard.inner_create_fn().__name__ not in _GUARDS_OF_VALUES or guard.name in found:
            continue
        with contextlib.suppress(Exception):  # not all names are expressions
            value = eval(guard.name, dict(scope))
            if isinstance(value, torch.Tensor):
                found[guard.name] = value.dtype, value.device, value.dim()
            elif isinstance(value, (bool, int, float, complex, str, bytes, type(None), enum.Enum)):
                found[guard.name] = type(value), value  # True equals 1
    return found


_GUARDS_OF_VALUES = {"CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "ID_MATCH", "TENSOR_MATCH"}


def innermost_backend(backend: Any) -> Any:
    """The backend that torch wrapped in ``backend``."""
    return _with_wrappers(backend)[-1]


def backend_arguments(backend: Any) -> dict[str, Any]:
    """The further arguments that torch will call the backend with."""
    arguments: dict[str, Any] = {}
    for wrapper in _with_wrappers(backend):
        for name in ("kwargs", "keywords"):
            arguments |= getattr(wrapper, name, None) or {}
    return arguments


def backend_key(backend: Any) -> tuple[Any, ...]:
    """A key that is equal for backends that torch considers equal, with the same options."""
    *wrappers, innermost = _with_wrappers(backend)
    given = [getattr(wrapper, name, None) for wrapper in wrappers for name in ("kwargs", "keywords", "dynamic")]
    return id(innermost), repr(given)


def _with_wrappers(backend: Any) -> list[Any]:
    for name in ("_torchdynamo_orig_backend", "compiler_fn", "func"):
        if hasattr(backend, name):
            return [backend, *_with_wrappers(getattr(backend, name))]
    return [backend]


def _outermost_module() -> torch.nn.Module | None:
    """The outermost module within ``torch.compile`` whose call led to the current compilation in this thread."""
    found = None
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, OptimizeContext):
            return found
        if isinstance(caller, torch.nn.Module):
            found = caller
        frame = frame.f_back
    return None


def called_module(root: torch.nn.Module) -> torch.nn.Module:
    """The module whose call led to the current compilation in this thread, a part of ``root``'s: the wrapper that
    ``torch.compile`` returned for ``root``, or else ``root`` itself."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, OptimizedModule) and caller._orig_mod is root:
            return caller
        frame = frame.f_back
    return root


def most_graphs() -> int:
    """Dynamo's limit for tracing a function."""
    return int(torch._dynamo.config.recompile_limit)


def is_traced_too_often(error: BaseException) -> bool:
    """Whether Dynamo raised ``error`` because it reached its limit for tracing a function."""
    return "recompile limit" in str(error) or "recompile_limit" in str(error)


def ends_in_break(graph_module: torch.fx.GraphModule) -> bool:
    """Whether this graph of Dynamo's ends in a graph break."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def watch_compilations(before: Callable[[str], None], after: Callable[[str], None]) -> bool:
    """From now on call ``before`` and ``after`` with the frame's number around each of Dynamo's compilations. Returns
    False if they are registered already; ``torch._dynamo.reset()`` removes them.
    """
    handler = torch._dynamo.callback.callback_handler
    if any(getattr(callback, "_calls", None) is before for callback in handler.start_callbacks):
        return False
    handler.register_start_callback(_on_dynamo(before))
    handler.register_end_callback(_on_dynamo(after))
    return True


def _on_dynamo(function: Callable[[str], None]) -> Callable[[CallbackArgs], None]:
    def callback(args: CallbackArgs) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            function(str(args.compile_id).rpartition("/")[0].rpartition("/")[2])

    callback._calls = function  # type: ignore[attr-defined]
    return callback


def dynamo_settings(most_graphs: int) -> contextlib.AbstractContextManager[None]:
    """Dynamo traces a function up to ``most_graphs`` times, and does not run garbage collection after tracing."""
    settings: dict[str, Any] = {"recompile_limit": most_graphs}
    if hasattr(torch._dynamo.config, "run_gc_after_compile"):
        settings["run_gc_after_compile"] = False
    return cast("contextlib.AbstractContextManager[None]", torch._dynamo.config.patch(**settings))


class SeenSizes:
    """The sizes that Dynamo has seen: those that have changed it makes symbolic. Initially empty."""

    def __init__(self) -> None:
        self._state: Any = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, which must hold ``compile_lock``, Dynamo uses only these."""
        if self._state is None:
            self._state = defaultdict(pgo.CodeState)
        others, pgo._CODE_STATE = pgo._CODE_STATE, self._state
        try:
            yield
        finally:
            pgo._CODE_STATE = others


def are_shapes_static() -> bool:
    """Whether the user disabled symbolic sizes in ``torch.compile``."""
    return not torch._dynamo.config.automatic_dynamic_shapes


@contextlib.contextmanager
def static_tracing() -> Iterator[None]:
    """Dynamo makes no size symbolic."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True):
        yield


@contextlib.contextmanager
def symbolic_tracing(note: Callable[[], object]) -> Iterator[None]:
    """Dynamo makes every size of every input symbolic, and calls ``note`` when it does. Attributes of modules, such as
    a LoRA's strength, and other numbers stay constant until they change.
    """
    original = builder.record_automatic_dynamic

    def record(tx: Any, name: str, tensor: torch.Tensor) -> Any:
        seen = original(tx, name, tensor)
        if not tensor.dim():
            return seen
        note()
        changed = (pgo.auto_dynamic,) * tensor.dim()
        return dataclasses.replace(seen, size=changed)

    builder.record_automatic_dynamic = record  # type: ignore[assignment]
    try:
        yield
    finally:
        builder.record_automatic_dynamic = original


@contextlib.contextmanager
def no_kernel_choice() -> Iterator[None]:
    """Tracing a convolution does not select its kernel: oneDNN's selection depends on the batch size, which would
    become a guard (torch 2.11). Not for compiling."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def is_transforming() -> bool:
    """Whether this thread is within a transform of ``torch.func``, whose tensors are wrappers without values."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def compile_lock() -> Any:
    """Dynamo's reentrant lock: neither Dynamo nor Inductor compiles in two threads at once."""
    return torch._dynamo.convert_frame.compile_lock


@contextlib.contextmanager
def others_call_uncompiled() -> Iterator[None]:
    """Within the block, FX may trace in this thread, while calls of compiled models in other threads run uncompiled.
    While it traces, FX replaces ``torch.nn.Module.__call__`` for the whole process, so that Dynamo's guards fail in
    every thread. Dynamo detects FX tracing and by default raises, although it could run the model uncompiled.
    """
    # The default, which applies in every thread. A config patch would apply in this one only (torch 2.13), and would
    # restore an explicit value, which overrides later defaults.
    entry: Any = torch._dynamo.config._config["error_on_nested_fx_trace"]  # type: ignore[attr-defined]
    before, entry.default = entry.default, False
    tracer, me = torch.fx.Tracer, threading.get_ident()
    traced = tracer.call_module

    def call_module(self: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != me:  # not a module that is being traced
            return forward(*args, **kwargs)
        return traced(self, module, forward, args, kwargs)

    tracer.call_module = call_module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        tracer.call_module = traced  # type: ignore[method-assign]
        entry.default = before


def graph_module(root: Any, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """An ``fx.GraphModule`` whose Python code is generated at its first call. Most of this package's graphs are never
    called, and generating SDXL's code takes a second."""
    if parts.lacks(parts.LAZY_GRAPHS):
        return torch.fx.GraphModule(root, graph)
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)
