"""The nodes as ComfyUI sees them: schemas and glue. Only ComfyUI can import this."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from onlinequant_backend.cache import ENVIRONMENT_VARIABLES

from .model_patch import quantize_model


class OnlineQuantModel(io.ComfyNode):
    """Patches a model so that it samples in 8 bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantModel",
            display_name="OnlineQuant Model",
            category="model/patch",
            description=(
                "Makes a model draw the same picture faster, in 8 bit. It is observed in float first, then compiled. "
                "LoRAs, other sizes and other prompts need neither again. "
                "Of several nodes that compile one model, such as TorchCompileModel, the last one counts."
            ),
            search_aliases=["quantize", "int8", "fp8", "torch.compile", "speed"],
            inputs=[
                io.Model.Input("model"),
                _percentage("quantized_conv_percentage", "convolutions"),
                _percentage("quantized_linear_percentage", "linear layers"),
                _threshold("conv_compute_density_threshold", 100, "A convolution"),
                _threshold("linear_compute_density_threshold", 300, "A linear layer"),
                io.Combo.Input(
                    "precision",
                    options=["auto", "fp8", "int8", "float"],
                    default="auto",
                    tooltip="The 8-bit format; auto takes what the device is fast at, float where there is nothing.",
                ),
                io.Int.Input(
                    "calibration_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many calls of the model are observed in float before the change to 8 bit. "
                    "0: all steps of the first sampling run, however many.",
                ),
                io.Combo.Input(
                    "selection",
                    options=["auto", "density", "measured"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Which layers are worth it: by the density thresholds, or by timing each one (CUDA only). "
                    "auto measures on CUDA, and the thresholds then have no effect.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    placeholder="*.ff.net.2, *.proj_out",
                    optional=True,
                    advanced=True,
                    tooltip="Names of layers that stay in float, separated by commas; * stands for anything.",
                ),
                io.Combo.Input(
                    "cuda_graphs",
                    options=["auto", "off"],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Replay a whole step as one CUDA graph, where there is CUDA.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, calibration_steps: int, exclude: str = "", cuda_graphs: str = "auto", **options: Any
    ) -> io.NodeOutput:
        options["exclude"] = tuple(re.findall(r"[^\s,]+", exclude))
        options["cuda_graphs"] = "auto" if cuda_graphs == "auto" else False
        options["cache_dir"] = _cache_directory()
        if calibration_steps:
            options["calibration_steps"] = calibration_steps
        whole_run = calibration_steps == 0
        return io.NodeOutput(quantize_model(model, options, whole_run, _text_on(cls.hidden.unique_id)))


class OnlineQuantExtension(ComfyExtension):
    """What ``comfy_entrypoint`` gives to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OnlineQuantModel]


def _percentage(name: str, layers: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=100,
        min=0,
        max=100,
        step=1,
        tooltip=f"Share of the {layers} that go into 8 bit, least sensitive first. 0 is none.",
    )


def _threshold(name: str, default: int, layer: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=default,
        min=0,
        max=10_000,
        step=10,
        tooltip=f"{layer} with fewer FLOPs per byte than this stays in float. GPUs choose by measuring instead, "
        "unless selection is density; on CPUs, 20 is a good value.",
    )


def _cache_directory() -> str | None:
    """A folder of ComfyUI's that is not reachable over HTTP; None where the environment names another one."""
    if any(map(os.environ.get, ENVIRONMENT_VARIABLES)) or not hasattr(folder_paths, "get_system_user_directory"):
        return None
    directory: str = folder_paths.get_system_user_directory("onlinequant")
    return directory


def _text_on(node: str) -> Callable[[str], None]:
    """A function that shows a text on a node, where it stays."""
    return lambda text: PromptServer.instance.send_progress_text(text, node)
