"""Global settings of torch on which traced and compiled graphs depend."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class GlobalState:
    """The state on which a graph's result depends besides its inputs; Dynamo traces again when it changes.

    Attributes:
        guarded: the whole state as text: autocast, the default dtype, determinism, precision of products, threads.
        default_dtype: of new tensors.
        autocast: the dtype for each type of device for which autocast is on.
    """

    guarded: str
    default_dtype: torch.dtype
    autocast: dict[str, torch.dtype]

    @classmethod
    def now(cls) -> GlobalState:
        """The current state in this thread."""
        from torch._C._dynamo.guards import GlobalStateGuard

        guard: Any = GlobalStateGuard()
        return cls(str(guard.__getstate__()), torch.get_default_dtype(), autocast_dtypes())

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        """Within the block, autocast, which is per thread and set by a ``with``, is in the recorded state."""
        with contextlib.ExitStack() as stack:
            for device in sorted({*self.autocast, *autocast_dtypes()}):
                is_on = device in self.autocast
                stack.enter_context(torch.autocast(device, dtype=self.autocast.get(device), enabled=is_on))
            yield


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # torch has no public list of them


def autocast_dtypes() -> dict[str, torch.dtype]:
    """The dtype of autocast for each type of device for which it is on in this thread."""
    devices = (device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device))
    return {device: torch.get_autocast_dtype(device) for device in devices}


# The settings on which a compile depends besides its graph, which another process needs as well: the keys of Inductor's
# caches include most of them.
_FLAGS = (
    "backends.cuda.matmul.allow_tf32",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    # After their older equivalents, and general settings before specific ones.
    "backends.fp32_precision",
    "backends.cudnn.fp32_precision",
    "backends.cudnn.conv.fp32_precision",
    "backends.cudnn.rnn.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.mkldnn.fp32_precision",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.rnn.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
)
# Pairs of getter and setter, and the order in which attention kernels are tried.
_SWITCHES = (
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
)
Settings = tuple[dict[str, Any], list[Any], list[dict[str, Any]]]
_held_settings: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("onlinequant_settings", default=None)


@contextlib.contextmanager
def held_settings() -> Iterator[None]:
    """Within the block, ``settings`` keep their current values. In ComfyUI, each layer of a float step temporarily
    changes the order of attention kernels for the whole process."""
    token = _held_settings.set(settings())
    try:
        yield
    finally:
        _held_settings.reset(token)


def settings() -> Settings:
    """The settings for ``apply_settings`` in another process, so that it compiles equally; must pickle."""
    held = _held_settings.get()
    if held is not None:
        return held
    flags = {name: value for name in _FLAGS if (value := _flag(name)) is not None}
    plain = (bool, int, float, str, type(None))
    configs = [
        {name: value for name, value in config.save_config_portable().items() if isinstance(value, plain)}
        for config in _configs()
    ]
    return flags, [ask() for ask, _ in _SWITCHES], configs


def _flag(name: str) -> Any:
    """A setting of torch by its name; None if this torch lacks it, or if its newer equivalent is set."""
    try:
        return operator.attrgetter(name)(torch)
    except (AttributeError, RuntimeError):
        return None


def apply_settings(settings: Settings) -> None:
    """Set all settings that differ."""
    flags, switches, configs = settings
    for name, value in flags.items():
        owner, _, attribute = name.rpartition(".")
        if _flag(name) != value:
            setattr(operator.attrgetter(owner)(torch), attribute, value)
    change: Any
    for (ask, change), value in zip(_SWITCHES, switches, strict=True):
        if ask() != value:
            change(value)
    for config, values in zip(_configs(), configs, strict=True):
        known = config.save_config_portable()
        config.load_config({name: value for name, value in values.items() if name in known and known[name] != value})


def _configs() -> tuple[Any, ...]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    return inductor_config, functorch_config
