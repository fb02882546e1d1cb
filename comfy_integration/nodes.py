"""The nodes as ComfyUI sees them: schemas and glue. Only ComfyUI can import this."""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

from onlinequant_backend.cache import ENVIRONMENT_VARIABLES
from onlinequant_backend.progress import Listener, Update

from .control_patch import quantize_control_net
from .model_patch import quantize_model, record_of_model
from .pictures import AMPLIFIED, compare

CATEGORY = "model/patch"
ALIASES = ["quantize", "int8", "fp8", "torch.compile", "speed"]


class OnlineQuantModel(io.ComfyNode):
    """Patches a model so that it samples in 8 bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantModel",
            display_name="OnlineQuant Model",
            category=CATEGORY,
            description=(
                "Makes a model draw the same picture faster, in 8 bit. The first sampling run is drawn in float and "
                "observed, then the model is compiled in the background. LoRAs, sizes and prompts may change then. "
                "Of several nodes that compile one model, such as TorchCompileModel, the last one counts."
            ),
            search_aliases=ALIASES,
            inputs=[io.Model.Input("model"), *_options()],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, calibration_steps: int, **options: Any) -> io.NodeOutput:
        listener = _text_on(cls.hidden.unique_id)
        options = _backend_options(calibration_steps, **options)
        return io.NodeOutput(quantize_model(model, options, calibration_steps == 0, listener))


class OnlineQuantControlNet(io.ComfyNode):
    """Has a ControlNet run in 8 bit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantControlNet",
            display_name="OnlineQuant ControlNet",
            category=CATEGORY,
            description=(
                "Makes a ControlNet run in 8 bit, as OnlineQuant Model does with a model; with or without that node. "
                "T2I adapters and control LoRAs go on in float."
            ),
            search_aliases=ALIASES,
            inputs=[io.ControlNet.Input("control_net"), *_options()],
            outputs=[io.ControlNet.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, control_net: Any, calibration_steps: int, **options: Any) -> io.NodeOutput:
        listener = _text_on(cls.hidden.unique_id)
        options = _backend_options(calibration_steps, **options)
        return io.NodeOutput(quantize_control_net(control_net, options, calibration_steps == 0, listener))


class OnlineQuantReport(io.ComfyNode):
    """Shows what became of a model's layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantReport",
            display_name="OnlineQuant Report",
            category=CATEGORY,
            description=(
                "Shows what OnlineQuant Model did: which layers are in 8 bit and why the others are not, how long a "
                "step takes in float and in 8 bit, and how far the picture is from the one drawn in float."
            ),
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="What OnlineQuant Model gives."),
                io.MultiType.Input(
                    "picture",
                    types=[io.Latent, io.Image],
                    optional=True,
                    tooltip="What this model has drawn. Connected, the report comes after the sampling.",
                ),
                io.MultiType.Input(
                    "reference",
                    types=[io.Latent, io.Image],
                    optional=True,
                    tooltip="The same drawn in float: same seed, same prompt, without OnlineQuant Model.",
                ),
            ],
            outputs=[
                io.String.Output("table", tooltip="A row for each layer: in 8 bit or in float, and why."),
                io.Image.Output("chart"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: Any) -> float:
        _warm_up()  # asked for before anything is sampled
        return float("nan")  # never equal to the last one: what it shows changes while its inputs do not

    @classmethod
    def execute(cls, model: Any, picture: Any = None, reference: Any = None) -> io.NodeOutput:
        record = record_of_model(model)
        if record is None:
            raise ValueError("This model does not come from OnlineQuant Model, or another node compiles it after that.")
        difference = None if picture is None or reference is None else _difference(picture, reference)
        _warm_up().join()
        from . import summary  # not when ComfyUI starts: matplotlib takes its time

        seen = record.snapshot()
        _text_on(cls.hidden.unique_id)(Update(summary.headline(seen, difference)))
        chart = summary.chart(seen)
        name = summary.save(chart, Path(folder_paths.get_temp_directory()))
        shown = ui.SavedImages([ui.SavedResult(name, "", io.FolderType.temp)])
        return io.NodeOutput(summary.table(seen, difference), summary.as_image(chart), ui=shown)


class OnlineQuantCompare(io.ComfyNode):
    """Compares two pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantCompare",
            display_name="OnlineQuant Compare",
            category=CATEGORY,
            description=(
                "How far a picture is from another one: PSNR, SSIM, and both side by side with their difference, "
                f"{AMPLIFIED} times amplified. From about 30 dB on, people see no difference."
            ),
            search_aliases=["psnr", "ssim", "difference", "quality"],
            inputs=[
                io.MultiType.Input("picture", types=[io.Latent, io.Image]),
                io.MultiType.Input(
                    "reference", types=[io.Latent, io.Image], tooltip="Of the same kind and size as the picture."
                ),
            ],
            outputs=[
                io.Image.Output("comparison", tooltip="Reference, picture and amplified difference."),
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio in dB."),
                io.Float.Output("ssim", tooltip="Structural similarity; 1 is equal."),
                io.String.Output("text"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, picture: Any, reference: Any) -> io.NodeOutput:
        comparison = compare(picture, reference)
        text, panels = str(comparison), comparison.side_by_side
        _text_on(cls.hidden.unique_id)(Update(text))
        shown = ui.PreviewImage(panels, cls=cls)
        return io.NodeOutput(panels, comparison.psnr, comparison.ssim, text, ui=shown)


class OnlineQuantExtension(ComfyExtension):
    """What ``comfy_entrypoint`` gives to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OnlineQuantModel, OnlineQuantControlNet, OnlineQuantReport, OnlineQuantCompare]


def _options() -> list[io.Input]:
    """The widgets of the two nodes that quantize."""
    return [
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
        io.Boolean.Input(
            "compile_in_background",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Sampling goes on in float until the 8-bit model is compiled, and then changes over, in the middle "
            "of a run if need be. Off: the first run waits for the compile at its end.",
        ),
    ]


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


def _backend_options(
    calibration_steps: int, exclude: str = "", cuda_graphs: str = "auto", **options: Any
) -> dict[str, Any]:
    """The backend's options of what the widgets hold."""
    options["exclude"] = tuple(re.findall(r"[^\s,]+", exclude))
    options["cuda_graphs"] = "auto" if cuda_graphs == "auto" else False
    options["cache_dir"] = _cache_directory()
    if calibration_steps:
        options["calibration_steps"] = calibration_steps
    return options


@functools.cache
def _warm_up() -> threading.Thread:
    """Have matplotlib ready by the time that a picture is drawn."""

    def work() -> None:
        from . import summary

        summary.warm_up()

    thread = threading.Thread(target=work, name="onlinequant-report", daemon=True)
    thread.start()
    return thread


def _difference(picture: Any, reference: Any) -> str:
    try:
        return str(compare(picture, reference))
    except ValueError as error:
        return str(error)


def _cache_directory() -> str | None:
    """A folder of ComfyUI's that is not reachable over HTTP; None where the environment names another one."""
    if any(map(os.environ.get, ENVIRONMENT_VARIABLES)) or not hasattr(folder_paths, "get_system_user_directory"):
        return None
    directory: str = folder_paths.get_system_user_directory("onlinequant")
    return directory


def _text_on(node: str) -> Listener:
    """A function that shows the text of an update on a node, where it stays."""
    return lambda update: PromptServer.instance.send_progress_text(update.text, node)
