"""The nodes' schemas and entry points. Only ComfyUI can import this."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy_api.latest import ComfyExtension, io, ui
from server import PromptServer

from onlinequant_backend.progress import Update
from onlinequant_backend.runtime.set_registry import known_sets

from .control_patch import quantize_control_net
from .model_patch import quantize_model, record_of_model
from .pictures import AMPLIFIED, compare
from .record import Record
from .status import Statuses
from .widgets import attention_input, observe_again_input, quantization_inputs, understood

CATEGORY = "model/patch"
ALIASES = ["quantize", "int8", "fp8", "torch.compile", "speed"]


class OnlineQuantModel(io.ComfyNode):
    """Patches a model so that it samples with 8-bit layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantModel",
            display_name="OnlineQuant Model",
            category=CATEGORY,
            description=(
                "Makes a model faster with 8-bit layers. The first sampling run is in float and is "
                "observed, then the model is compiled in the background. LoRAs, sizes and prompts may change later. "
                "Of several nodes that compile one model, such as TorchCompileModel, only the last one has an effect."
            ),
            search_aliases=ALIASES,
            inputs=[io.Model.Input("model"), *quantization_inputs(), observe_again_input(), attention_input()],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        listener = _statuses.listener(cls.hidden.unique_id, OnlineQuantModel.__name__, settings, model.model)
        options, whole_run, observe_again = understood(**settings)
        quantized = quantize_model(model, options, whole_run, listener)
        record = record_of_model(quantized)
        if record is not None and record.is_to_observe_again(observe_again):
            _observe_again(model.model.diffusion_model, record)
        return io.NodeOutput(quantized)


class OnlineQuantControlNet(io.ComfyNode):
    """Patches a ControlNet so that it runs with 8-bit layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantControlNet",
            display_name="OnlineQuant ControlNet",
            category=CATEGORY,
            description=(
                "Runs a ControlNet with 8-bit layers, as OnlineQuant Model does with a model; with or without it. "
                "T2I adapters and control LoRAs stay in float."
            ),
            search_aliases=ALIASES,
            inputs=[io.ControlNet.Input("control_net"), *quantization_inputs(), attention_input()],
            outputs=[io.ControlNet.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, control_net: Any, **settings: Any) -> io.NodeOutput:
        network = getattr(control_net, "control_model", None)
        listener = _statuses.listener(cls.hidden.unique_id, OnlineQuantControlNet.__name__, settings, network)
        options, whole_run, _ = understood(**settings)
        return io.NodeOutput(quantize_control_net(control_net, options, whole_run, listener))


class OnlineQuantReport(io.ComfyNode):
    """Shows which of a model's layers are quantized, and how fast it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantReport",
            display_name="OnlineQuant Report",
            category=CATEGORY,
            description=(
                "Shows what OnlineQuant Model did: which layers are quantized and why the others are not, how long a "
                "step takes in float and quantized, and how much the image differs from the one sampled in float."
            ),
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="The output of OnlineQuant Model."),
                io.MultiType.Input(
                    "picture",
                    types=[io.Latent, io.Image],
                    optional=True,
                    tooltip="An image or latent sampled with this model. If connected, the report runs after sampling.",
                ),
                io.MultiType.Input(
                    "reference",
                    types=[io.Latent, io.Image],
                    optional=True,
                    tooltip="The image or latent sampled in float: same seed, same prompt, without OnlineQuant Model.",
                ),
            ],
            outputs=[
                io.String.Output("table", tooltip="A row for each layer: quantized or in float, and why."),
                io.Image.Output("chart"),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: Any) -> float:
        _warm_up()  # ComfyUI calls this before it samples
        return float("nan")  # never equal to the last one: the report changes even if its inputs do not

    @classmethod
    def execute(cls, model: Any, picture: Any = None, reference: Any = None) -> io.NodeOutput:
        record = record_of_model(model)
        if record is None:
            raise ValueError("This model does not come from OnlineQuant Model, or another node compiles it after that.")
        difference = None if picture is None or reference is None else _difference(picture, reference)
        _warm_up().join()
        from . import summary  # not at ComfyUI's start: importing matplotlib takes long

        seen = record.snapshot()
        _say(cls.hidden.unique_id, OnlineQuantReport, summary.headline(seen, difference))
        chart = summary.chart(seen)
        name = summary.save(chart, Path(folder_paths.get_temp_directory()))
        shown = ui.SavedImages([ui.SavedResult(name, "", io.FolderType.temp)])
        return io.NodeOutput(summary.table(seen, difference), summary.as_image(chart), ui=shown)


class OnlineQuantCompare(io.ComfyNode):
    """Compares two images or latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OnlineQuantCompare",
            display_name="OnlineQuant Compare",
            category=CATEGORY,
            description=(
                "Compares two images: PSNR, SSIM, and both side by side with their difference, "
                f"{AMPLIFIED} times amplified. From about 30 dB on, people see no difference."
            ),
            search_aliases=["psnr", "ssim", "difference", "quality"],
            inputs=[
                io.MultiType.Input("picture", types=[io.Latent, io.Image]),
                io.MultiType.Input(
                    "reference", types=[io.Latent, io.Image], tooltip="An image or latent of the same kind and size."
                ),
            ],
            outputs=[
                io.Image.Output("comparison", tooltip="Reference, image and amplified difference."),
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
        _say(cls.hidden.unique_id, OnlineQuantCompare, text)
        shown = ui.PreviewImage(panels, cls=cls)
        return io.NodeOutput(panels, comparison.psnr, comparison.ssim, text, ui=shown)


class OnlineQuantExtension(ComfyExtension):
    """The extension that ``comfy_entrypoint`` returns to ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OnlineQuantModel, OnlineQuantControlNet, OnlineQuantReport, OnlineQuantCompare]


def _observe_again(denoiser: Any, record: Record) -> None:
    """Discard a model's observations; its compiled graphs stay."""
    if known_sets.observe_again(list(denoiser.parameters())):
        record.start_over()


@functools.cache
def _warm_up() -> threading.Thread:
    """Prepare matplotlib in the background, before a chart is drawn."""

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


_statuses = Statuses(lambda text, node: PromptServer.instance.send_progress_text(text, node))


def _say(node: str, kind: type[io.ComfyNode], text: str) -> None:
    """Show a text on a node that has no settings."""
    _statuses.listener(node, kind.__name__, {})(Update(text))


@PromptServer.instance.routes.get("/onlinequant/status")
async def _status(_request: web.Request) -> web.Response:
    """The texts on all nodes, for a page that was reloaded."""
    return web.json_response(_statuses.shown())
