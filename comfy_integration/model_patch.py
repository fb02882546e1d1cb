"""The hook: a clone of a ComfyUI model whose denoiser runs through the backend while it samples. Does not import
ComfyUI's modules, so that it can be tested without them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from onlinequant_backend.compilation.graph_memory import give_back_freed_memory, trim_graph_memory
from onlinequant_backend.progress import Listener, Update, told_to
from onlinequant_backend.runtime import SamplingRun, current_run

from . import gpu_memory
from .compiled_method import CompiledMethod
from .record import Record, record_of
from .residency import clone_in_place

# The key that ComfyUI's own TorchCompileModel uses as well: a model has one wrapper, that of the last such node.
APPLY_MODEL, KEY = "apply_model", "torch.compile"
SAMPLER_SAMPLE, OWN_KEY = "sampler_sample", "onlinequant"


def quantize_model(model: Any, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> Any:
    """A clone of a ``ModelPatcher`` that samples with 8-bit layers; ``model`` is not changed.

    ``options``: of the backend. ``whole_run``: observe all calls of one sampling run, however many, instead of
    ``calibration_steps``. ``listener`` gets updates of the progress.
    """
    clone = clone_in_place(model)
    hook = ModelHook(options, whole_run, listener)
    for kind, key, wrapper in ((APPLY_MODEL, KEY, hook), (SAMPLER_SAMPLE, OWN_KEY, hook.sample)):
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def record_of_model(model: Any) -> Record | None:
    """The record of the denoiser of a model that ``quantize_model`` returned; None for any other model."""
    for hook in model.get_wrappers(APPLY_MODEL, KEY):
        if isinstance(hook, ModelHook):
            return hook.record(model.model.diffusion_model)
    return None


class ModelHook:
    """The wrapper that ComfyUI calls around each call of a model, and its ``sample`` around each sampling run. Only the
    code inside the denoiser's own wrappers is compiled, so that these (for example caches that skip steps) may do what
    a graph cannot.
    """

    def __init__(self, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> None:
        self._options = repr(sorted(options.items()))  # the key of a record, needed at every call
        self._whole_run = whole_run
        self._listener = listener
        self._method = CompiledMethod(options, listener)
        self._last_record: Record | None = None

    def record(self, denoiser: Any) -> Record:
        """The record of a denoiser with these options, from this hook or an earlier one."""
        return record_of(denoiser, self._options)

    def sample(
        self, executor: Any, guider: Any, sigmas: Any, extra_args: Any, callback: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Around a sampling run: observes all of its calls, and compiles the 8-bit model at its end."""
        run = SamplingRun(len(sigmas) - 1, is_observed=self._whole_run)
        device = getattr(getattr(guider, "model_patcher", None), "load_device", None)
        give_back_freed_memory(device)  # cached memory from decoding the last image
        gpu_memory.free_unused()
        with told_to(self._listener), run.current():
            result = executor(guider, sigmas, extra_args, _counting(run, callback), *args, **kwargs)
            try:
                run.end()
            except Exception as error:
                self._method.fail(error)
            self._say_how_it_stands()
            trim_graph_memory(device)  # decoding the image may need it
            return result

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a call of the model."""
        denoiser = executor.class_obj.diffusion_model
        name = "_forward" if hasattr(denoiser, "_forward") else "forward"
        with contextlib.ExitStack() as stack:
            stack.enter_context(told_to(self._listener))
            stack.enter_context(self._method.in_place(denoiser, name))
            run = current_run()
            if run is not None:
                self._last_record = self.record(denoiser)
                stack.enter_context(self._last_record.call(run, getattr(args[0], "shape", None)))
            return executor(*args, **kwargs)

    def _say_how_it_stands(self) -> None:
        """Report the state after each run. Errors were reported when they occurred."""
        if self._method.trouble is not None:
            return
        if self._last_record is not None and self._last_record.reports:
            self._listener(Update(" · ".join(self._last_record.summaries())))


def _counting(run: SamplingRun, callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """The sampler's callback after each step, which also updates the run's step."""

    def after_step(step: int, *args: Any) -> Any:
        run.step = min(step + 2, run.steps)  # the next one; ComfyUI counts from 0
        return None if callback is None else callback(step, *args)

    return after_step
