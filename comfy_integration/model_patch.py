"""The hook: a clone of a ComfyUI model whose denoiser runs through the backend while it samples.

ComfyUI's own modules are not needed here, so that this can be tested without them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from onlinequant_backend import OnlineQuantError, onlinequant, sampling_step
from onlinequant_backend.progress import Listener, told_to

_log = logging.getLogger("onlinequant")

# Where ComfyUI's own TorchCompileModel keeps its wrapper as well: a model has one, that of the last node that compiles.
WRAPPER, KEY = "apply_model", "torch.compile"


def quantize_model(model: Any, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> Any:
    """A clone of a ``ModelPatcher`` that samples in 8 bit; ``model`` stays as it is.

    ``options``: of the backend. ``whole_run``: observe the steps of one sampling run, however many, instead of
    ``calibration_steps`` calls. ``listener`` is told how far it has come.
    """
    clone = _clone(model)
    clone.remove_wrappers_with_key(WRAPPER, KEY)
    clone.add_wrapper_with_key(WRAPPER, KEY, Hook(options, whole_run, listener))
    return clone


def _clone(model: Any) -> Any:
    """A clone without dynamic VRAM: layers whose weights are fetched inside the graph would stay in float."""
    if "disable_dynamic" in inspect.signature(model.clone).parameters:
        try:
            return model.clone(disable_dynamic=True)
        except RuntimeError as error:  # ComfyUI cannot load it again
            _log.warning("layers whose weights are loaded on demand stay in float: %s", error)
    return model.clone()


class Hook:
    """What ComfyUI calls around each call of a model: it puts the compiled denoiser in place for that long.

    The model is shared with other nodes, which must not notice. Only what is inside the denoiser's own wrappers is
    compiled, so that these (caches that skip steps, say) may do what no graph can.
    """

    def __init__(self, options: Mapping[str, Any], whole_run: bool, listener: Listener) -> None:
        self._options = dict(options)
        self._whole_run = whole_run
        self._listener = listener
        self._original: Callable[..., Any] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._failed = False

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return executor(*args, **kwargs)
        denoiser = executor.class_obj.diffusion_model
        name = "_forward" if hasattr(denoiser, "_forward") else "forward"
        with contextlib.ExitStack() as stack:
            stack.enter_context(told_to(self._listener))
            stack.enter_context(_replaced(denoiser, name, self._guarded(getattr(denoiser, name))))
            sampling = _sampling((*args, *kwargs.values()))
            if self._whole_run and sampling is not None:
                stack.enter_context(sampling_step(lambda: _position(sampling)))
            return executor(*args, **kwargs)

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``original`` through the backend; as it is, from then on, where that fails."""
        if original != self._original:
            # With equal options, Dynamo takes the graphs that it has. A dict of its own, since torch may change it.
            self._compiled = torch.compile(original, backend=onlinequant, options=dict(self._options))
            self._original = original
        compiled = self._compiled
        assert compiled is not None

        def denoise(*args: Any, **kwargs: Any) -> Any:
            if self._failed:
                return original(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                # If this fails as well, it is no fault of ours, and ComfyUI's to deal with.
                result = original(*args, **kwargs)
                self._give_up(error)
                return result

        return denoise

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        trace = None if isinstance(error, OnlineQuantError) else error  # a mistake of the user's says all by itself
        _log.warning("onlinequant failed, so the model goes on in float: %s", error, exc_info=trace)
        self._listener(f"in float, since it failed: {error}")


@contextlib.contextmanager
def _replaced(denoiser: torch.nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within the block, ``denoiser.name`` is ``method``; afterwards it is what it was before."""
    missing = object()
    before = vars(denoiser).get(name, missing)
    setattr(denoiser, name, method)
    try:
        yield
    finally:
        if before is missing:
            delattr(denoiser, name)
        else:
            setattr(denoiser, name, before)


def _sampling(arguments: tuple[Any, ...]) -> Mapping[str, torch.Tensor] | None:
    """What ComfyUI hands to the model about the sampling run; None where a sampler of somebody else's leaves it out."""
    for options in arguments:
        if isinstance(options, Mapping) and isinstance(options.get("sigmas"), torch.Tensor):
            schedule = options.get("sample_sigmas")
            return options if isinstance(schedule, torch.Tensor) and len(schedule) > 1 else None
    return None


def _position(sampling: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Which step of a run a call belongs to, of how many, by its noise level: a step may take several calls."""
    levels = sampling["sample_sigmas"].detach().float().cpu()[:-1]
    level = sampling["sigmas"].detach().float().cpu().max()
    return int((levels - level).abs().argmin()) + 1, len(levels)
