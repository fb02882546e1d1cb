"""The widgets of the nodes that quantize, and the backend options for their values. Only ComfyUI can import this."""

from __future__ import annotations

import os
import re
from typing import Any

import folder_paths
from comfy_api.latest import io

from onlinequant_backend.cache.cache_store import ENVIRONMENT_VARIABLES

from .presets import CUSTOM, PRESETS


def quantization_inputs() -> list[io.Input]:
    """The widgets of the two nodes that quantize. All may be missing in a workflow, such as one from before presets
    existed: then a node uses the values that it has."""
    return [
        io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default=next(iter(PRESETS)),
            optional=True,
            extra_dict={"presets": PRESETS},
            tooltip="fast: all layers that become faster are quantized. faithful: the most sensitive tenth stays in "
            "float, which halves the error. custom: the values of the other widgets, which the other presets fill in.",
        ),
        _percentage("quantized_conv_percentage", "convolutions"),
        _percentage("quantized_linear_percentage", "linear layers"),
        _threshold("conv_compute_density_threshold", "A convolution"),
        _threshold("linear_compute_density_threshold", "A linear layer"),
        io.Combo.Input(
            "precision",
            options=["auto", "fp8", "int8", "float"],
            default="auto",
            optional=True,
            tooltip="The 8-bit format; auto is the fastest format of the device, float if it has no 8-bit kernels.",
        ),
        io.Int.Input(
            "calibration_steps",
            default=0,
            min=0,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="The number of calls of the model that are observed in float before it is quantized. "
            "0: all steps of the first sampling run.",
        ),
        io.Combo.Input(
            "selection",
            options=["auto", "density", "measured"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip="How to select among the layers above the thresholds. measured: by timing each (CUDA only); "
            "density: all are quantized; auto: measured on CUDA.",
        ),
        io.String.Input(
            "exclude",
            default="",
            placeholder="*.ff.net.2, *.proj_out",
            optional=True,
            advanced=True,
            tooltip="Names of layers that stay in float, separated by commas; * matches any text. "
            "OnlineQuant Report shows the names.",
        ),
        io.Combo.Input(
            "cuda_graphs",
            options=["auto", "off"],
            default="auto",
            optional=True,
            advanced=True,
            tooltip="Replay a whole step as one CUDA graph, on CUDA devices.",
        ),
        io.Boolean.Input(
            "compile_in_background",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Sampling continues in float until the 8-bit model is compiled, then switches to it, even in the "
            "middle of a run. Off: the first run waits at its end for the compile.",
        ),
    ]


def observe_again_input() -> io.Int.Input:
    return io.Int.Input(
        "observe_again",
        default=0,
        min=0,
        max=1_000_000,
        optional=True,
        advanced=True,
        tooltip="Increase this to observe the next run again, for instance for very different prompts.",
    )


def attention_input() -> io.Int.Input:
    """The last widget: a workflow that was saved before it existed has the values of the others in order."""
    return _percentage("quantized_attention_percentage", "attention layers", is_advanced=True)


def _percentage(name: str, layers: str, is_advanced: bool = False) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=100,
        min=0,
        max=100,
        step=1,
        optional=True,
        advanced=is_advanced or None,
        tooltip=f"Percentage of the {layers} that are quantized, least sensitive first. 0 is none.",
    )


def _threshold(name: str, layer: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=10_000,
        step=1,
        optional=True,
        advanced=True,
        tooltip=f"{layer} with fewer FLOPs per byte than this stays in float. 0 is automatic: GPUs time each layer and "
        "keep those in float that gain too little; on CPUs it is 20.",
    )


def understood(
    preset: str = CUSTOM,
    quantized_conv_percentage: int = 100,
    quantized_linear_percentage: int = 100,
    quantized_attention_percentage: int = 100,
    conv_compute_density_threshold: int = 0,
    linear_compute_density_threshold: int = 0,
    calibration_steps: int = 0,
    exclude: str = "",
    cuda_graphs: str = "auto",
    compile_in_background: bool = True,
    observe_again: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], bool, int]:
    """The widgets' values: the backend's options, whether a whole run is observed, and ``observe_again``."""
    values = {
        "quantized_conv_percentage": quantized_conv_percentage,
        "quantized_linear_percentage": quantized_linear_percentage,
        "quantized_attention_percentage": quantized_attention_percentage,
        "conv_compute_density_threshold": conv_compute_density_threshold,
        "linear_compute_density_threshold": linear_compute_density_threshold,
        "exclude": exclude,
        "cuda_graphs": cuda_graphs,
        **options,
        **PRESETS.get(preset, {}),
    }
    for kind in ("conv", "linear"):
        values[f"{kind}_compute_density_threshold"] = values[f"{kind}_compute_density_threshold"] or None
    values["exclude"] = tuple(re.findall(r"[^\s,]+", values["exclude"]))
    values["cuda_graphs"] = "auto" if values["cuda_graphs"] == "auto" else False
    values["compile_in_background"] = compile_in_background
    values["cache_dir"] = _cache_directory()
    if calibration_steps:
        values["calibration_steps"] = calibration_steps
    return values, calibration_steps == 0, observe_again


def _cache_directory() -> str | None:
    """A folder of ComfyUI's that is not reachable over HTTP; None if the environment names another one."""
    if any(map(os.environ.get, ENVIRONMENT_VARIABLES)) or not hasattr(folder_paths, "get_system_user_directory"):
        return None
    directory: str = folder_paths.get_system_user_directory("onlinequant")
    return directory
