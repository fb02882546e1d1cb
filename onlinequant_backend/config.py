"""The options of the backend: one frozen dataclass, validated before any work."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from . import errors
from .torch_internals import inductor_interface

PRECISIONS = ("auto", "int8", "fp8", "float")
SENSITIVITIES = ("gradient", "local", "end_to_end")
CALIBRATION_METHODS = ("mse", "percentile", "minmax")
CUDA_GRAPHS = ("auto", True, False)
REGIONAL_COMPILATIONS = ("auto", True, False)
SELECTIONS = ("auto", "density", "measured")
SHAPES = ("auto", "static", "dynamic")
FLOAT_WEIGHTS = ("auto", "device", "host")
# Options with a few allowed values, but for ``precision``, whose error has a class of its own.
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "calibration_method": CALIBRATION_METHODS,
    "sensitivity": SENSITIVITIES,
    "cuda_graphs": CUDA_GRAPHS,
    "regional_compilation": REGIONAL_COMPILATIONS,
    "selection": SELECTIONS,
    "shapes": SHAPES,
    "float_weights": FLOAT_WEIGHTS,
    "compile_in_background": (True, False),
    "free_float_weights": (True, False),
    "save_weights": (True, False),
}
# Options that change nothing of what is in the cache.
_HOUSEKEEPING = (
    *("cache_dir", "cache_size_limit", "compile_in_background", "drift_check_every", "float_weights", "lock_timeout"),
    "save_weights",
)

# Characters of a wrong value that a message shows.
_LONGEST = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Options of ``torch.compile(model, backend="onlinequant", options={...})``; each field is one option.

    Attributes:
        quantized_conv_percentage: share of convolutions to quantize in [0, 100], least sensitive first; 0 means none.
        quantized_linear_percentage: the same for linear layers.
        quantized_attention_percentage: the same for attention, on GPUs.
        conv_compute_density_threshold: a convolution below this many FLOPs per byte stays in float, whatever
            ``selection``; [0, inf). None leaves it to timing where layers are timed, and is 100 on other GPUs and 20
            on CPUs.
        linear_compute_density_threshold: the same for linear layers; None is 300 on GPUs that time none, 20 on CPUs.
        precision: "auto", "int8", "fp8" or "float"; "auto" takes what the device is fast at.
        calibration_steps: calls observed in float before layers are quantized; at least 1.
        calibration_method: "mse" clips each range where the squared error is least; "percentile" clips the outermost
            10**-4 of the values; "minmax" keeps all of it.
        exclude: glob patterns of layer names that stay in float, with all that an adapter (PEFT) puts around them.
        sensitivity: what ranks layers for percentages and ``max_error``: "gradient" (what a layer's error does to the
            model's output, by one backward pass, run only where it decides something), "local" (the error of its own
            output) or "end_to_end" (the error of the model's output, measured by one forward pass for each layer).
        selection: what keeps layers in float besides the thresholds that were set. "measured": to gain too little in
            8 bit when timed at their real shapes (CUDA only); "density": nothing, the other thresholds have their
            defaults; "auto" takes what the device has.
        shapes: "auto" compiles the first shape on its own and all others as one graph with symbolic sizes; "static"
            compiles each on its own; "dynamic" only the graph with symbolic sizes.
        max_error: largest relative error that 8-bit layers may cause in a step, measured when observing is over; layers
            stay in float, most sensitive first, until it holds. None quantizes all, and warns if the error of the first
            step is visible in a picture.
        drift_check_every: one of so many calls checks whether activations exceed the observed ranges, which are then
            widened; after a change of weights or sizes each step of two runs does. 0 means never.
        compile_in_background: whether to compile in another thread while the model goes on in float; not with
            ``free_float_weights``, under autocast, or where the graph writes into its inputs.
        float_weights: where the float weights are that have 8-bit copies, on a GPU. "host": in host memory from the
            first call on, and layers that gain nothing are in 8 bit too, which needs the least memory of the GPU;
            "auto": on the host from the end of observing on, or from the first call if that takes no longer; "device":
            always on the GPU. On the host they can be read and written as before.
        free_float_weights: whether to free the float weights that have 8-bit copies. Then they cannot change.
        save_weights: whether to save the 8-bit weights in the cache, so that later processes read them instead of
            quantizing; they take about half of the size of a float16 checkpoint.
        cache_dir: where the cache is; None means the environment's or the platform's cache directory.
        cache_size_limit: GB (1e9 bytes) that the cache may take; what was used least recently goes first.
        lock_timeout: seconds to wait for another process that is calibrating the same model.
        cuda_graphs: "auto" (on for CUDA), True or False.
        regional_compilation: whether a region that the graph repeats is compiled once, for the graph's first sizes;
            "auto" (on for CPUs), True or False.
        inductor: options passed on to Inductor.
        mode: a ``torch.compile`` mode, passed on to Inductor.
    """

    quantized_conv_percentage: float = 100
    quantized_linear_percentage: float = 100
    quantized_attention_percentage: float = 100
    conv_compute_density_threshold: float | None = None
    linear_compute_density_threshold: float | None = None
    precision: str = "auto"
    calibration_steps: int = 20
    calibration_method: str = "mse"
    exclude: tuple[str, ...] = ()
    sensitivity: str = "gradient"
    selection: str = "auto"
    shapes: str = "auto"
    max_error: float | None = None
    drift_check_every: int = 64
    compile_in_background: bool = False
    float_weights: str = "auto"
    free_float_weights: bool = False
    save_weights: bool = False
    cache_dir: str | None = None
    cache_size_limit: float = 20
    lock_timeout: float = 600
    cuda_graphs: str | bool = "auto"
    regional_compilation: str | bool = "auto"
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mode: str | None = None

    def __post_init__(self) -> None:
        for name in ("conv", "linear", "attention"):
            self._check_number(f"quantized_{name}_percentage", _check_percentage)
        for name in ("conv_compute_density_threshold", "linear_compute_density_threshold"):
            if getattr(self, name) is not None:
                self._check_number(name, _check_threshold)
        if not _is_choice(self.precision, PRECISIONS):
            raise errors.UnknownPrecisionError(_choose_from("precision", self.precision, PRECISIONS))
        if not _is_count(self.calibration_steps, least=1):
            raise errors.InvalidCalibrationStepsError(
                f"calibration_steps is {_shown(self.calibration_steps)}, but it counts observed calls: give an "
                f"integer of at least 1 and at most {sys.maxsize}."
            )
        if self.max_error is not None:
            _check_amount("max_error", self.max_error, "||result - float|| / ||float||")
            object.__setattr__(self, "max_error", float(self.max_error))
        if not _is_count(self.drift_check_every, least=0):
            raise errors.InvalidOptionError(
                f"drift_check_every is {_shown(self.drift_check_every)}, but it counts calls: give an integer of "
                f"at most {sys.maxsize}, or 0 for never."
            )
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name, unit in (("cache_size_limit", "GB"), ("lock_timeout", "seconds")):
            _check_amount(name, getattr(self, name), unit)
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "exclude", _checked_patterns(self.exclude))
        if isinstance(self.cache_dir, os.PathLike):
            object.__setattr__(self, "cache_dir", os.fspath(self.cache_dir))
        if self.cache_dir is not None and not _is_path(self.cache_dir):
            raise errors.InvalidOptionError(f"cache_dir is {_shown(self.cache_dir)}: give a directory's path, or None.")
        _check_mode(self.mode)
        object.__setattr__(self, "inductor", _checked_inductor_options(self.inductor))

    def _check_number(self, name: str, check: Callable[[str, Any], None]) -> None:
        check(name, getattr(self, name))
        object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> QuantConfig:
        """Build a config from what ``torch.compile`` hands on; an unknown option raises UnknownOptionError."""
        given = dict(options or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(_shown(name).strip("'"), known, n=1)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise errors.UnknownOptionError(
                    f"Unknown option {_shown(name)}.{meant} Known options: {', '.join(known)}. "
                    "Inductor's own options go into options={'inductor': {...}}."
                )
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every option as JSON-ready data."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude), "inductor": dict(self.inductor)}

    def cache_key(self) -> str:
        """A hex digest that changes with every option that can change the result, so not with the cache's own."""
        options = {name: value for name, value in self.to_dict().items() if name not in _HOUSEKEEPING}
        return hashlib.sha256(json.dumps(options, sort_keys=True, default=repr).encode()).hexdigest()

    def inductor_options(self) -> dict[str, Any]:
        """What Inductor is given: the options of ``mode``, then those of ``inductor``, which win."""
        from_mode = inductor_interface.inductor_mode_options(self.mode) if self.mode else {}
        return {**from_mode, **self.inductor}


def _is_choice(value: object, allowed: tuple[object, ...]) -> bool:
    return any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed)


def _choose_from(name: str, value: object, allowed: tuple[object, ...]) -> str:
    return f"{name} is {_shown(value)}, but it must be one of: {', '.join(map(repr, allowed))}."


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not _is_choice(value, allowed):
        raise errors.InvalidOptionError(_choose_from(name, value, allowed))


def _shown(value: object) -> str:
    """A wrong value for a message: Python refuses to write integers of more than 4300 digits."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _is_number(value: object, most: float = sys.float_info.max) -> bool:
    """Whether a value is a number in [0, most] that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= sys.maxsize


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _check_percentage(name: str, value: Any) -> None:
    if not _is_number(value, most=100):
        raise errors.InvalidPercentageError(f"{name} is {_shown(value)}, but a percentage is a number in [0, 100].")


def _check_threshold(name: str, value: Any) -> None:
    if not _is_number(value):
        raise errors.InvalidThresholdError(
            f"{name} is {_shown(value)}, but a density threshold is a number of FLOPs per byte in [0, inf), or None."
        )


def _check_amount(name: str, value: Any, unit: str) -> None:
    if not _is_number(value):
        raise errors.InvalidOptionError(f"{name} is {_shown(value)}: give a number of {unit} in [0, inf).")


def _check_mode(mode: Any) -> None:
    if mode is None:
        return
    try:
        if not (isinstance(mode, str) and mode):  # torch takes all that is false for no mode
            raise TypeError("it must be one of torch.compile's modes, or None")
        inductor_interface.inductor_mode_options(mode)
    except (RuntimeError, TypeError) as error:
        raise errors.InvalidOptionError(f"mode is {_shown(mode)}, which torch.compile does not know: {error}") from None


def _checked_patterns(exclude: Any) -> tuple[str, ...]:
    if isinstance(exclude, str) or not isinstance(exclude, (tuple, list)):
        raise errors.InvalidOptionError(
            f"exclude is {_shown(exclude)}: give a tuple of glob patterns, for instance ('*.to_out.0', 'conv_in')."
        )
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise errors.InvalidOptionError(f"exclude holds {_shown(pattern)}, but every pattern must be a string.")
    return tuple(exclude)


def _checked_inductor_options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise errors.InvalidOptionError(f"inductor is {_shown(options)}: give a dict of Inductor options.")
    types = inductor_interface.inductor_option_types() if options else {}
    checked: dict[str, Any] = {}
    for given, value in options.items():
        name = given.replace("-", "_") if isinstance(given, str) else ""
        if name not in types:
            raise errors.UnknownOptionError(
                f"Inductor has no option {_shown(given)}; torch._inductor.list_options() lists what it has."
            )
        kind = types[name]
        if kind is not None and not isinstance(value, kind):
            raise errors.InvalidOptionError(
                f"Inductor's option {name} is {_shown(value)}, of type {type(value).__name__}, but it must be of type "
                f"{kind.__name__}."
            )
        checked[name] = value
    return checked
