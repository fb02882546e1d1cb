"""Workflows for the tests, in the format of ComfyUI's API, built from what their pictures depend on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# As by default, but for what a test's sizes and any CPU need: hardly a threshold, and 8 bit whatever the device.
OPTIONS: Mapping[str, Any] = {
    "preset": "custom",
    "quantized_conv_percentage": 100,
    "quantized_linear_percentage": 100,
    "conv_compute_density_threshold": 1,
    "linear_compute_density_threshold": 1,
    "precision": "int8",
    "calibration_steps": 0,
    "compile_in_background": False,
}
HINT = "hint.png"  # in the server's input folder
DIT, OTHER_DIT = "dit", "dit_of_other_weights"  # of ``tiny_models``, like the next ones
SMALL_UNET, SMALL_CONTROL_NET = "small_unet.safetensors", "small_control_net.safetensors"


class Link(NamedTuple):
    """An output of a node, as the inputs of others name it."""

    node: str
    output: int = 0


class Workflow:
    """Nodes in API format, which grow one by one."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, kind: str, **inputs: Any) -> Link:
        """A node of this class; returns its first output."""
        name = f"{len(self.nodes)} {kind}"
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return Link(name)

    def outputs(self, kind: str, count: int, **inputs: Any) -> list[Link]:
        """The same; returns the first ``count`` outputs."""
        node = self.add(kind, **inputs).node
        return [Link(node, output) for output in range(count)]

    def patched(self, model: Link, patches: Iterable[Patch]) -> Link:
        """The model behind these patches."""
        for kind, inputs in patches:
            model = self.add(kind, model=model, **dict(inputs))
        return model

    def sample(self, **inputs: Any) -> Link:
        """A KSampler, which samples even if ComfyUI still has what it returned for the same inputs."""
        # ComfyUI compares all inputs with the last prompt's, and ignores those that a node does not have.
        return self.add("KSampler", **inputs, asked=next(self._numbers))

    def save(self, sampled: Link, vae: Link) -> None:
        """Decode and save what was sampled."""
        self.add("SaveImage", images=self.add("VAEDecode", samples=sampled, vae=vae), filename_prefix="test")

    def report(self, model: Link, sampled: Link) -> None:
        """What the Report node says after the sampling, as a text."""
        self.add("PreviewAny", source=self.add("OnlineQuantReport", model=model, picture=sampled))


class Patch(NamedTuple):
    """A node that takes a model and gives one."""

    kind: str
    inputs: tuple[tuple[str, Any], ...] = ()


def patch(kind: str, **inputs: Any) -> Patch:
    return Patch(kind, tuple(inputs.items()))


QUANTIZE = patch("OnlineQuantModel", **OPTIONS)
COMPILE = patch("TorchCompileModel", backend="inductor")


def lora(strength: float, kind: str = "LoraLoaderModelOnly", model: str = "sd15") -> Patch:
    return patch(kind, lora_name=f"tiny_{model}_lora.safetensors", strength_model=strength)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What a picture of a text-to-image workflow depends on.

    Attributes:
        patches: what the model goes through on its way to the sampler, our own node among it.
        unet, weights: the file and the weight_dtype for UNETLoader; else the model is the checkpoint's.
        control_end: a ControlNet is applied up to this part of the noise schedule, whose second half is sampled.
        control_quantized: that one goes through our node.
    """

    checkpoint: str = "sd15"
    patches: tuple[Patch, ...] = ()
    seed: int = 1
    size: tuple[int, int] = (128, 128)
    batch: int = 1
    steps: int = 3
    cfg: float = 2.0
    negative: str = "blurry"
    unet: str | None = None
    weights: str = "default"
    control_end: float | None = None
    control_quantized: bool = False

    def but(self, **changes: Any) -> Drawing:
        return dataclasses.replace(self, **changes)

    def quantized(self) -> Drawing:
        """The same with our node behind all others."""
        return self.but(patches=(*self.patches, QUANTIZE))

    def in_float(self) -> Drawing:
        """The same without what compiles."""
        patches = tuple(patch for patch in self.patches if patch.kind not in (QUANTIZE.kind, COMPILE.kind))
        return self.but(patches=patches, control_quantized=False)

    def workflow(self, report: bool = False) -> dict[str, Any]:
        """``report``: what the Report node says after it, as a text."""
        flow = Workflow()
        self.add_to(flow, report)
        return flow.nodes

    def add_to(self, flow: Workflow, report: bool = False) -> None:
        model, clip, vae = flow.outputs("CheckpointLoaderSimple", 3, ckpt_name=f"tiny_{self.checkpoint}.safetensors")
        if self.checkpoint.startswith(DIT):  # has no text encoder of its own
            clip = flow.outputs("CheckpointLoaderSimple", 2, ckpt_name="tiny_sd15.safetensors")[1]
        if self.unet is not None:
            model = flow.add("UNETLoader", unet_name=self.unet, weight_dtype=self.weights)
        model = flow.patched(model, self.patches)
        positive = flow.add("CLIPTextEncode", clip=clip, text="a photo of a cat")
        negative = flow.add("CLIPTextEncode", clip=clip, text=self.negative)
        if self.control_end is not None:
            positive, negative = self._control(flow, positive, negative, vae)
        latent = "EmptySD3LatentImage" if self.checkpoint.startswith(DIT) else "EmptyLatentImage"
        sampled = flow.sample(
            model=model,
            positive=positive,
            negative=negative,
            latent_image=flow.add(latent, width=self.size[0], height=self.size[1], batch_size=self.batch),
            seed=self.seed,
            steps=self.steps,
            cfg=self.cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=0.5,
        )
        flow.save(sampled, vae)
        if report:
            flow.report(model, sampled)

    def _control(self, flow: Workflow, positive: Link, negative: Link, vae: Link) -> list[Link]:
        net = flow.add("ControlNetLoader", control_net_name=SMALL_CONTROL_NET)
        if self.control_quantized:
            net = flow.add("OnlineQuantControlNet", control_net=net, **OPTIONS)
        return flow.outputs(
            "ControlNetApplyAdvanced",
            2,
            positive=positive,
            negative=negative,
            control_net=net,
            image=flow.add("LoadImage", image=HINT),
            strength=1.0,
            start_percent=0.0,
            end_percent=self.control_end,
            vae=vae,
        )


@dataclasses.dataclass(frozen=True)
class Video:
    """A workflow that makes a short video of a picture."""

    patches: tuple[Patch, ...] = ()
    seed: int = 1

    def but(self, **changes: Any) -> Video:
        return dataclasses.replace(self, **changes)

    def quantized(self) -> Video:
        return self.but(patches=(QUANTIZE,))

    def in_float(self) -> Video:
        return self.but(patches=())

    def workflow(self, report: bool = False) -> dict[str, Any]:
        flow = Workflow()
        loaded = flow.outputs("ImageOnlyCheckpointLoader", 3, ckpt_name="tiny_svd.safetensors")
        model, vision, vae = loaded
        model = flow.add("VideoLinearCFGGuidance", model=model, min_cfg=1.0)
        model = flow.patched(model, self.patches)
        positive, negative, latent = flow.outputs(
            "SVD_img2vid_Conditioning",
            3,
            clip_vision=vision,
            init_image=flow.add("LoadImage", image=HINT),
            vae=vae,
            width=128,
            height=128,
            video_frames=4,
            motion_bucket_id=127,
            fps=6,
            augmentation_level=0.0,
        )
        sampled = flow.sample(
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            seed=self.seed,
            steps=2,
            cfg=2.5,
            sampler_name="euler",
            scheduler="karras",
            denoise=1.0,
        )
        flow.save(sampled, vae)
        if report:
            flow.report(model, sampled)
        return flow.nodes
