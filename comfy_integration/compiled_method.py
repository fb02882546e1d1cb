"""A method of a model that is replaced by a compiled one for the duration of each call, and runs in float on errors."""

from __future__ import annotations

import contextlib
import logging
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from onlinequant_backend import OnlineQuantError, onlinequant
from onlinequant_backend.backend import failures_raised
from onlinequant_backend.garbage_collection import without_garbage_collection
from onlinequant_backend.progress import Listener, Progress, Update, is_listened_to
from onlinequant_backend.runtime import SamplingRun, current_run
from onlinequant_backend.torch_internals import parts

from . import own_products

_log = logging.getLogger("onlinequant")

# For one model with all its options, patches and ControlNets. Dynamo's default limit is 8, beyond which all calls run
# in float without a message.
_MOST_GRAPHS = 64

_tracing = threading.local()

# Each model's own copy of a method's function, by the original function.
_copies: weakref.WeakKeyDictionary[torch.nn.Module, dict[types.FunctionType, types.FunctionType]]
_copies = weakref.WeakKeyDictionary()
# Copies of deleted models, by kind: the next model reuses what Dynamo has traced, since ComfyUI loads a checkpoint
# again whenever another one took its place.
_left: dict[Hashable, list[types.FunctionType]] = {}
_MOST_LEFT = 2  # of a kind

# The number of failed runs in a row after which no more attempts are made: each may cost a trace.
_MOST_FAILURES = 3


class CompiledMethod:
    """The compiled method of one node. Models are shared with other nodes, which must not be affected: the method is
    replaced only during each call.

    Attributes:
        trouble: why the last call, or the compile after the last run, failed and calls run in float; None if nothing
            failed.
    """

    def __init__(self, options: Mapping[str, Any], listener: Listener) -> None:
        lack = parts.why_float()
        self.trouble = None if lack is None else f"in float: {lack}"
        self._options = dict(options)
        self._listener = listener
        self._original: Callable[..., Any] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._failures = 0 if lack is None else _MOST_FAILURES
        self._run: Callable[[], SamplingRun | None] = lambda: None

    @contextlib.contextmanager
    def in_place(self, module: torch.nn.Module, name: str) -> Iterator[None]:
        """Within the block, ``module.name`` is compiled; restores the original afterwards."""
        self._notice_run()
        if self.trouble is not None:
            yield
            return
        missing = object()
        before = vars(module).get(name, missing)
        setattr(module, name, self._guarded(getattr(module, name)))
        leaves_float = self._options.get("precision") != "float" and parts.why_float() is None
        try:
            with own_products.replaced(module) if leaves_float else contextlib.nullcontext():
                yield
        finally:
            if before is missing:
                delattr(module, name)
            else:
                setattr(module, name, before)

    def _notice_run(self) -> None:
        """At the start of a sampling run, retry what failed in the last one: the error may have been temporary."""
        run = current_run()
        if run is None or self._run() is run:
            return
        self._run = weakref.ref(run)
        if self.trouble is None:
            self._failures = 0
        elif self._failures < _MOST_FAILURES:
            self.trouble = None

    def fail(self, error: Exception) -> None:
        """Continue in float for the rest of the run, and report the reason."""
        # An error in the settings does not go away by a retry.
        self._failures = _MOST_FAILURES if isinstance(error, OnlineQuantError) else self._failures + 1
        again = "tried again at the next run" if self._failures < _MOST_FAILURES else "not tried again"
        self.trouble = f"in float, since it failed ({again}): {error}"
        trace = None if isinstance(error, OnlineQuantError) else error  # a user's error needs no traceback
        _log.warning("onlinequant failed, so the model continues in float: %s", error, exc_info=trace)
        self._listener(Update(self.trouble))

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original`` run through the backend; if that fails, ``original`` itself until the run ends."""
        from onlinequant_backend.torch_internals import dynamo_interface  # not without what ``parts`` looks for

        if original != self._original:
            # With equal options, Dynamo reuses its graphs. A new dict, since torch may change it.
            dynamo_interface.watch_compilations(_tracing_begins, _tracing_ends)
            self._compiled = torch.compile(_with_own_code(original), backend=onlinequant, options=dict(self._options))
            self._original = original
        compiled = self._compiled
        assert compiled is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.trouble is not None:
                return original(*args, **kwargs)
            try:
                with dynamo_interface.dynamo_settings(_MOST_GRAPHS), _tracing_may_begin(original), failures_raised():
                    return compiled(*args, **kwargs)
            except Exception as error:
                _tracing_ends("")
                # If this fails as well, the error is the model's, and ComfyUI handles it.
                result = original(*args, **kwargs)
                self.fail(error)
                return result

        return call


class _Call(contextlib.ExitStack):
    """A call of a method of ``model`` during which Dynamo may trace; closed at its end."""

    def __init__(self, model: object) -> None:
        super().__init__()
        self.model = model


@contextlib.contextmanager
def _tracing_may_begin(method: Callable[..., Any]) -> Iterator[None]:
    with _Call(getattr(method, "__self__", None)) as _tracing.call:
        try:
            yield
        finally:
            _tracing.call = None


def _tracing_begins(_frame: str) -> None:
    """Show progress while Dynamo traces a model, which blocks sampling: about 20 seconds for SDXL."""
    _tracing.trace = trace = contextlib.ExitStack()
    call: _Call | None = getattr(_tracing, "call", None)
    if call is not None:  # else the trace is not for this package
        call.enter_context(without_garbage_collection())
    if is_listened_to():
        trace.enter_context(Progress("tracing the model"))


def _tracing_ends(_frame: str) -> None:
    trace, _tracing.trace = getattr(_tracing, "trace", None), None
    if trace is not None:
        trace.close()


def _with_own_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with a code object of its own, always the same one for a model. Dynamo keeps graphs per code object,
    and all of ComfyUI's UNets share one: it would check the guards of every checkpoint's graphs at every call.
    """
    function, model = getattr(method, "__func__", None), getattr(method, "__self__", None)
    if not isinstance(function, types.FunctionType) or not isinstance(model, torch.nn.Module) or _holds(function):
        return method
    copies = _copies.setdefault(model, {})
    if function not in copies:
        kind = function, type(model), tuple((name, x.shape, x.dtype) for name, x in model.named_parameters())
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        left = [] if has_hooks else _left.setdefault(kind, [])  # Dynamo does not guard on hooks
        copies[function] = left.pop() if left else _copied(function)
        if not has_hooks:
            weakref.finalize(model, _leave, left, copies[function]).atexit = False
    return types.MethodType(copies[function], model)


def _holds(function: types.FunctionType) -> bool:
    """Whether a function references objects other than classes, such as one from another node that references the
    model."""
    return any(not isinstance(cell.cell_contents, type) for cell in function.__closure__ or ())


def _leave(left: list[types.FunctionType], function: types.FunctionType) -> None:
    if len(left) < _MOST_LEFT:
        left.append(function)


def _copied(function: types.FunctionType) -> types.FunctionType:
    code, closure = function.__code__.replace(), function.__closure__
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
