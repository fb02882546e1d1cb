"""What ``comfyui_workflows.py`` runs: the project's own templates, and what is changed in them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "example_workflows" / "api"
VARIANTS = ("baseline", "compiled", "quantized")
LOADERS = ("CheckpointLoaderSimple", "ImageOnlyCheckpointLoader")
COMPILERS = ("OnlineQuantModel", "TorchCompileModel")
LATENTS = ("EmptyLatentImage", "SVD_img2vid_Conditioning")
# What a template may have that shows something and makes nothing: variants differ in the model's path alone.
SHOWN = ("OnlineQuantReport", "PreviewAny")
# On a CPU the defaults, meant for GPUs, put hardly a layer of a tiny model in 8 bit.
TINY_OPTIONS = {"precision": "int8", "conv_compute_density_threshold": 20, "linear_compute_density_threshold": 20}

Graph = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Workflow:
    """A row of the table.

    Attributes:
        model: "sdxl", "sd15" or "svd", which names the templates and the checkpoint.
        title: what the table calls it.
        size: width and height in pixels.
        batch: pictures of a prompt; frames of a video.
        steps: of the sampler.
        other_size: what it is changed to.
        tiny: whether the models are tiny.
    """

    model: str
    title: str
    size: tuple[int, int]
    batch: int
    other_size: tuple[int, int]
    steps: int = 20
    tiny: bool = False

    @property
    def prefix(self) -> str:
        """How the names of its models begin."""
        return f"{'tiny' if self.tiny else 'full'}_{self.model}"

    @property
    def is_video(self) -> bool:
        return self.model == "svd"

    def made_tiny(self) -> Workflow:
        """The same for a CPU."""
        batch = 4 if self.is_video else 1
        title = self.title.partition(",")[0] + ", tiny"
        return dataclasses.replace(
            self, title=title, size=(128, 128), batch=batch, other_size=(192, 128), steps=3, tiny=True
        )


WORKFLOWS = {
    "sdxl-1024": Workflow("sdxl", "SDXL, 1024x1024", (1024, 1024), 1, (832, 1216)),
    "sdxl-512-b4": Workflow("sdxl", "SDXL, 512x512, batch 4", (512, 512), 4, (640, 448)),
    "sd15-512-b4": Workflow("sd15", "SD1.5, 512x512, batch 4", (512, 512), 4, (512, 768)),
    "svd": Workflow("svd", "SVD, 25 frames of 1024x576", (1024, 576), 25, (768, 448)),
}


@dataclasses.dataclass(frozen=True)
class Change:
    """What is different from a workflow's own prompt; None and "" leave something as it is.

    Attributes:
        lora: strength of a LoRA, which stands before the node that compiles or after it (``lora_place``).
        control: whether a ControlNet takes part.
        checkpoint: "other" for a second one of the same kind.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None
    cfg: float | None = None
    lora: float | None = None
    lora_place: str = "after"
    control: bool = False
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One prompt of a row of changes.

    Attributes:
        label: what the table calls it.
        before: what is done first: "" for nothing, "free" for ComfyUI's `/free`, "restart" for another server.
    """

    label: str
    change: Change = Change()
    before: str = ""


CHANGES = ("lora", "size", "batch", "cfg", "controlnet", "checkpoints", "free", "restart")


def changes(workflow: Workflow) -> dict[str, list[Step]]:
    """The prompts of each of ``CHANGES`` that a workflow can have; each ends where it began."""
    steps: dict[str, list[Step]] = {}
    if not workflow.is_video:
        steps["lora"] = [*_loras("after"), *_loras("before")]
    width, height = workflow.other_size
    steps["size"] = _and_again(f"{width}x{height}", Change(size=workflow.other_size))
    if not workflow.is_video:
        steps["batch"] = _and_again("batch 2", Change(batch=2))
    steps["cfg"] = _and_again("cfg 1", Change(cfg=1.0))
    if not workflow.is_video:
        steps["controlnet"] = _and_again("ControlNet", Change(control=True))
    steps["checkpoints"] = [
        *_and_again("second checkpoint", Change(checkpoint="other")),
        Step("second checkpoint once more", Change(checkpoint="other")),
        Step("first checkpoint once more"),
    ]
    steps["free"] = [Step("after /free", before="free"), Step("again")]
    steps["restart"] = [Step("after a restart", before="restart"), Step("again")]
    return steps


def _loras(place: str) -> list[Step]:
    steps = [
        Step(f"LoRA {place} the node, strength {strength}", Change(lora=strength, lora_place=place))
        for strength in (1.0, 0.5)
    ]
    return [*steps, Step(f"LoRA {place} the node gone")]


def _and_again(label: str, change: Change) -> list[Step]:
    return [Step(label, change), Step(f"{label}, again", change), Step("as before")]


def seeds(workflow: Workflow) -> dict[tuple[str, int], int]:
    """A seed for each step of each change, so that ComfyUI has none of them in its cache already."""
    places = [(name, index) for name, steps in changes(workflow).items() for index in range(len(steps))]
    return {place: 100 + number for number, place in enumerate(places)}


def models(workflow: Workflow, wanted: Iterable[str]) -> list[dict[str, Any]]:
    """The files that a workflow loads with these changes, as ``comfyui_probe.checkpoints.write`` takes them."""
    files = [("checkpoint", f"{workflow.prefix}.safetensors", 1)]
    if "checkpoints" in wanted:
        files.append(("checkpoint", f"{workflow.prefix}_other.safetensors", 2))
    if "lora" in wanted and not workflow.is_video:
        files.append(("lora", f"{workflow.prefix}_lora.safetensors", 3))
    if "controlnet" in wanted and not workflow.is_video:
        files.append(("controlnet", f"{workflow.prefix}_control.safetensors", 4))
    return [{"kind": kind, "model": workflow.model, "file": file, "seed": seed} for kind, file, seed in files]


def graph(workflow: Workflow, variant: str, seed: int, change: Change | None = None) -> Graph:
    """What is posted: the template of this model and variant with the workflow's sizes and a change."""
    template = json.loads((TEMPLATES / f"{workflow.model}_{variant}.json").read_text())
    return edited(template, workflow, seed, change or Change())


def edited(template: Graph, workflow: Workflow, seed: int, change: Change) -> Graph:
    """A copy of a template in API format with all of this in it; the latent image is saved, too."""
    nodes = {key: node for key, node in copy.deepcopy(template).items() if node["class_type"] not in SHOWN}
    load = _node(nodes, LOADERS)
    suffix = f"_{change.checkpoint}" if change.checkpoint else ""
    nodes[load]["inputs"]["ckpt_name"] = f"{workflow.prefix}{suffix}.safetensors"
    sampler = _node(nodes, ("KSampler",))
    sampling = nodes[sampler]["inputs"]
    sampling.update(seed=seed, steps=workflow.steps)
    if change.cfg is not None:
        sampling["cfg"] = change.cfg
    _resize(nodes[_node(nodes, LATENTS)]["inputs"], workflow, change)
    if change.lora is not None:
        _add_lora(nodes, workflow, change)
    if change.control:
        _add_control(nodes, workflow)
    if workflow.tiny:
        for node in nodes.values():
            if node["class_type"].startswith("OnlineQuant"):
                node["inputs"].update(TINY_OPTIONS)
    _add(nodes, "SaveLatent", samples=[sampler, 0], filename_prefix="benchmark")
    return nodes


def _resize(inputs: dict[str, Any], workflow: Workflow, change: Change) -> None:
    inputs["width"], inputs["height"] = change.size or workflow.size
    inputs["video_frames" if workflow.is_video else "batch_size"] = change.batch or workflow.batch


def _add_lora(nodes: Graph, workflow: Workflow, change: Change) -> None:
    """Between the node that compiles, if there is one, and what is before or after it."""
    compilers = list(_found(nodes, COMPILERS))
    place = compilers[0] if compilers and change.lora_place == "before" else _node(nodes, ("KSampler",))
    inputs = nodes[place]["inputs"]
    inputs["model"] = _add(
        nodes,
        "LoraLoaderModelOnly",
        model=inputs["model"],
        lora_name=f"{workflow.prefix}_lora.safetensors",
        strength_model=change.lora,
    )


def _add_control(nodes: Graph, workflow: Workflow) -> None:
    """A ControlNet of a picture; where the model is in 8 bit, so is it, with the node of the template that has one."""
    control = _add(nodes, "ControlNetLoader", control_net_name=f"{workflow.prefix}_control.safetensors")
    if list(_found(nodes, ("OnlineQuantModel",))):
        template = json.loads((TEMPLATES / "sdxl_lora_controlnet.json").read_text())
        options = template[_node(template, ("OnlineQuantControlNet",))]["inputs"]
        control = _add(nodes, "OnlineQuantControlNet", **{**options, "control_net": control})
    drawn = _add(nodes, "LoadImage", image="example.png")
    # Its edges would take kornia to draw, and take as long to use.
    hint = _add(nodes, "ImageInvert", image=drawn)
    sampling = nodes[_node(nodes, ("KSampler",))]["inputs"]
    applied, _ = _add(
        nodes,
        "ControlNetApplyAdvanced",
        positive=sampling["positive"],
        negative=sampling["negative"],
        control_net=control,
        image=hint,
        strength=0.6,
        start_percent=0.0,
        end_percent=1.0,
        vae=[_node(nodes, LOADERS), 2],
    )
    sampling.update(positive=[applied, 0], negative=[applied, 1])


def _add(nodes: Graph, kind: str, **inputs: Any) -> list[Any]:
    """The first output of a new node."""
    key = str(max(map(int, nodes)) + 1)
    nodes[key] = {"class_type": kind, "inputs": inputs}
    return [key, 0]


def _node(nodes: Graph, kinds: tuple[str, ...]) -> str:
    """The one node of these kinds."""
    (key,) = _found(nodes, kinds)
    return key


def _found(nodes: Graph, kinds: tuple[str, ...]) -> Iterator[str]:
    return iter([key for key, node in nodes.items() if node["class_type"] in kinds])
