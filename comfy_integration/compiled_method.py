"""A method of a model that runs through the backend for as long as a call takes, and in float where that fails."""

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
from onlinequant_backend.torch_internals import dynamo_interface

_log = logging.getLogger("onlinequant")

# Of one model with all the options, patches and ControlNets that it meets. Dynamo stops at 8, after which it leaves
# everything in float without a word.
_MOST_GRAPHS = 64

_tracing = threading.local()

# Each model's own copy of a method's function, by what it was copied from.
_copies: weakref.WeakKeyDictionary[torch.nn.Module, dict[types.FunctionType, types.FunctionType]]
_copies = weakref.WeakKeyDictionary()
# Those of models that are gone, by their kind: Dynamo has traced them already for the next one, as ComfyUI loads a
# checkpoint anew whenever another one was in its place.
_left: dict[Hashable, list[types.FunctionType]] = {}
_MOST_LEFT = 2  # of a kind

# Runs in a row that may fail before the next ones are left alone: each attempt may cost a trace.
_MOST_FAILURES = 3


class CompiledMethod:
    """What one node has compiled.

    Models are shared with other nodes, which must not notice: the method is put in place for each call alone.

    Attributes:
        trouble: why the last call, or what came after the last run, went on in float; None if nothing went wrong.
    """

    def __init__(self, options: Mapping[str, Any], listener: Listener) -> None:
        self.trouble: str | None = None
        self._options = dict(options)
        self._listener = listener
        self._original: Callable[..., Any] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._failures = 0
        self._run: Callable[[], SamplingRun | None] = lambda: None

    @contextlib.contextmanager
    def in_place(self, module: torch.nn.Module, name: str) -> Iterator[None]:
        """Within the block, ``module.name`` is compiled; afterwards it is what it was before."""
        self._notice_run()
        if self.trouble is not None:
            yield
            return
        missing = object()
        before = vars(module).get(name, missing)
        setattr(module, name, self._guarded(getattr(module, name)))
        try:
            yield
        finally:
            if before is missing:
                delattr(module, name)
            else:
                setattr(module, name, before)

    def _notice_run(self) -> None:
        """Where a sampling run begins, what failed in the last one is tried again: it may have been passing."""
        run = current_run()
        if run is None or self._run() is run:
            return
        self._run = weakref.ref(run)
        if self.trouble is None:
            self._failures = 0
        elif self._failures < _MOST_FAILURES:
            self.trouble = None

    def fail(self, error: Exception) -> None:
        """Go on in float for the rest of the run, and say why."""
        # A mistake in the settings stays one.
        self._failures = _MOST_FAILURES if isinstance(error, OnlineQuantError) else self._failures + 1
        again = "tried again at the next run" if self._failures < _MOST_FAILURES else "not tried again"
        self.trouble = f"in float, since it failed ({again}): {error}"
        trace = None if isinstance(error, OnlineQuantError) else error  # a mistake of the user's says all by itself
        _log.warning("onlinequant failed, so the model goes on in float: %s", error, exc_info=trace)
        self._listener(Update(self.trouble))

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original`` through the backend; as it is, until the run ends, where that fails."""
        if original != self._original:
            # With equal options, Dynamo takes the graphs that it has. A dict of its own, since torch may change it.
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
                # If this fails as well, it is no fault of ours, and ComfyUI's to deal with.
                result = original(*args, **kwargs)
                self.fail(error)
                return result

        return call


class _Call(contextlib.ExitStack):
    """A call that may trace, of a method of ``model``. It is closed when it is over."""

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
    """Dynamo traces a model, for which everybody has to wait: some 20 seconds for SDXL."""
    _tracing.trace = trace = contextlib.ExitStack()
    call: _Call | None = getattr(_tracing, "call", None)
    if call is not None:  # or else it is not ours
        call.enter_context(without_garbage_collection())
    if is_listened_to():
        trace.enter_context(Progress("tracing the model"))


def _tracing_ends(_frame: str) -> None:
    trace, _tracing.trace = getattr(_tracing, "trace", None), None
    if trace is not None:
        trace.close()


def _with_own_code(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with a code object of its own, always the same one for a model.

    Dynamo keeps graphs by code object, and all of ComfyUI's UNets share one. It would check the guards of each
    checkpoint's graphs at every call.
    """
    function, model = getattr(method, "__func__", None), getattr(method, "__self__", None)
    if not isinstance(function, types.FunctionType) or not isinstance(model, torch.nn.Module) or _holds(function):
        return method
    copies = _copies.setdefault(model, {})
    if function not in copies:
        kind = function, type(model), tuple((name, x.shape, x.dtype) for name, x in model.named_parameters())
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        left = [] if has_hooks else _left.setdefault(kind, [])  # Dynamo does not ask about hooks
        copies[function] = left.pop() if left else _copied(function)
        if not has_hooks:
            weakref.finalize(model, _leave, left, copies[function]).atexit = False
    return types.MethodType(copies[function], model)


def _holds(function: types.FunctionType) -> bool:
    """Whether a function refers to more than classes, as one that another node has put in place may to the model."""
    return any(not isinstance(cell.cell_contents, type) for cell in function.__closure__ or ())


def _leave(left: list[types.FunctionType], function: types.FunctionType) -> None:
    if len(left) < _MOST_LEFT:
        left.append(function)


def _copied(function: types.FunctionType) -> types.FunctionType:
    code, closure = function.__code__.replace(), function.__closure__
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
