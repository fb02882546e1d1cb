"""The hook for a ControlNet: a copy whose network runs through the backend."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from onlinequant_backend.progress import Listener, Update, told_to
from onlinequant_backend.runtime import SamplingRun, current_run

from .compiled_method import CompiledMethod
from .residency import put_control_net_in_place


def quantize_control_net(control_net: Any, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> Any:
    """A copy of a ``ControlNet`` that runs quantized; ``control_net`` is not changed. See ``quantize_model``. Those
    without a permanent network (a T2I adapter runs once, a control LoRA makes one for each run) stay in float, which is
    reported to ``listener``.
    """
    copy = control_net.copy()
    if not isinstance(getattr(control_net, "control_model", None), nn.Module):
        why = f"a {type(control_net).__name__} has no network of its own that every step runs"
        listener(Update(f"in float: {why}"))
        return copy
    put_control_net_in_place(copy)
    return ControlHook(options, whole_run, listener).attach(copy)


class ControlHook:
    """The hook of a ControlNet object and all its copies: each node that applies one makes a copy."""

    def __init__(self, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> None:
        self._whole_run = whole_run
        self._listener = listener
        self._method = CompiledMethod(options, listener)
        # The current run if the model itself is in float, and the schedule that identifies it.
        self._own_run: tuple[SamplingRun, Any] | None = None

    def attach(self, control: Any) -> Any:
        """Have ``control`` and all copies of it run through the backend."""
        get_control, copy, cleanup = control.get_control, control.copy, control.cleanup
        signature = inspect.signature(get_control)

        def hooked_get_control(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            with self._running(control.control_model, arguments.get("transformer_options")):
                return get_control(*args, **kwargs)

        def hooked_cleanup() -> Any:
            self._end_own_run()
            return cleanup()

        control.get_control, control.cleanup = hooked_get_control, hooked_cleanup
        control.copy = lambda: self.attach(copy())
        return control

    @contextlib.contextmanager
    def _running(self, network: nn.Module, transformer_options: Any) -> Iterator[None]:
        run = current_run()
        with contextlib.ExitStack() as stack:
            stack.enter_context(told_to(self._listener))
            if self._whole_run and run is None and isinstance(transformer_options, Mapping):
                stack.enter_context(self._next_step(transformer_options.get("sample_sigmas")).current())
            stack.enter_context(self._method.in_place(network, "forward"))
            yield

    def _next_step(self, schedule: Any) -> SamplingRun:
        """The run with this schedule, advanced by one step if it is known."""
        if self._own_run is None or self._own_run[1] is not schedule:
            steps = 1 if schedule is None else len(schedule) - 1
            self._own_run = SamplingRun(steps), schedule
        else:
            run = self._own_run[0]
            run.step = min(run.step + 1, run.steps)
        return self._own_run[0]

    def _end_own_run(self) -> None:
        """End the run when ComfyUI cleans up, which it does after every run that was not interrupted."""
        own, self._own_run = self._own_run, None
        if own is None:
            return
        try:
            with told_to(self._listener):
                own[0].end()
        except Exception as error:
            self._method.fail(error)
