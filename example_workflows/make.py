"""Writes the example workflows into this folder, ``*.json`` under the titles that ComfyUI lists them by.

``python example_workflows/make.py`` writes ``api/*.json``, which programs post to a server.
``python example_workflows/make.py http://127.0.0.1:8188`` also writes ``*.json``, which people open: in which order the
inputs of a node come, and which of them are widgets, is asked of that ComfyUI, where onlinequant must be installed.

A workflow is described once: by its nodes, in the order in which they run, each in a group. A group becomes a column.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent

# Each file that a workflow loads: its folder in `models` and its home, for ComfyUI's list of missing models.
MODELS = {
    "sd_xl_base_1.0.safetensors": ("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0"),
    "v1-5-pruned-emaonly.safetensors": ("checkpoints", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "svd_xt_1_1.safetensors": ("checkpoints", "stabilityai/stable-video-diffusion-img2vid-xt-1-1"),
    "sd_xl_offset_example-lora_1.0.safetensors": ("loras", "stabilityai/stable-diffusion-xl-base-1.0"),
    "diffusers_xl_canny_full.safetensors": ("controlnet", "lllyasviel/sd_control_collection"),
}
PICTURE = "example.png"  # lies in the input folder of every ComfyUI

# What both OnlineQuant nodes that patch a model have in common: their defaults.
DEFAULTS: dict[str, Value] = {
    "preset": "fast",
    "quantized_conv_percentage": 100,
    "quantized_linear_percentage": 100,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 0,
    "precision": "auto",
    "calibration_steps": 0,
    "selection": "auto",
    "exclude": "",
    "cuda_graphs": "auto",
    "compile_in_background": True,
}

SEED = 1
PROMPT = "a lighthouse on a cliff at dawn, detailed oil painting, warm light"
UNWANTED = "blurry, low quality, watermark"


class Link(NamedTuple):
    """An output of a node, by the node's id."""

    node: int
    output: int


@dataclasses.dataclass(frozen=True)
class Look:
    """How a node is drawn.

    Attributes:
        title: what is written above it; empty for what ComfyUI calls it.
        room: height in pixels of what the node shows once it has run.
        width: in pixels; all nodes of a group are as wide as the widest.
    """

    title: str = ""
    room: int = 0
    width: int = 420


@dataclasses.dataclass(frozen=True)
class Node:
    """A node of ComfyUI's; where it stands for a value, its first output is meant.

    Attributes:
        kind: what ComfyUI calls its class.
        inputs: every widget has its value here, so that both formats say the same.
    """

    id: int
    group: str
    kind: str
    look: Look
    inputs: Mapping[str, Value | Link]

    def __getitem__(self, output: int) -> Link:
        return Link(self.id, output)


Value: TypeAlias = "int | float | str | bool"
Input: TypeAlias = "Value | Link | Node"

PLAIN, PROGRESS, PREVIEW = Look(), Look(room=80), Look(room=320)


class Workflow:
    """A workflow, made node by node.

    Attributes:
        title: what ComfyUI lists it as: the name of its file.
        note: Markdown that people see beside it.
    """

    def __init__(self, title: str, note: str) -> None:
        self.title = title
        self.note = f"# {title}\n\n{note}"
        self.nodes: list[Node] = []

    def add(self, group: str, kind: str, look: Look = PLAIN, /, **inputs: Input) -> Node:
        """Add a node, see there."""
        linked = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        node = Node(len(self.nodes) + 1, group, kind, look, linked)
        self.nodes.append(node)
        return node


# --- The workflows ---

HOW_IT_GOES = """\
**First run.** Drawn in float, exactly as without the node, while the ranges of the activations are observed. At its
end the model is compiled, once: about a minute on a GPU, minutes on a CPU. The node shows how far it is.

**From the second run on** it is in 8 bit, and so is the first run after a restart, since everything is saved. The seed
goes up by one each time, so just press Run again.

**Nothing is observed or compiled again** for another prompt, seed, LoRA or strength. A second size compiles one more
graph, which then serves all sizes.
"""


# In the order in which they should be tried.
VARIANTS = {"baseline": "1 in float", "compiled": "2 TorchCompileModel", "quantized": "3 OnlineQuant"}


def text_to_image(name: str, variant: str, checkpoint: str, size: int) -> Workflow:
    """From a prompt to a picture, with nothing else; ``variant``: see ``accelerated``."""
    workflow = Workflow(f"{name} {VARIANTS[variant]}", f"{name}, {size} x {size}.\n\n{notes(variant)}")
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = accelerated(workflow, variant, loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=size, height=size, batch_size=1)
    latent = sampled(workflow, "Picture", model, positive[0], negative[0], empty[0])
    saved(workflow, "Picture", latent, loader[2], f"{name.lower()}_{variant}")
    return workflow


def reported() -> Workflow:
    """SDXL in 8 bit with what became of each layer."""
    workflow = Workflow("SDXL 4 report", f"Which layers are in 8 bit, why the rest is not, how fast.\n\n{HOW_IT_GOES}")
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    model = accelerated(workflow, "quantized", loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    latent = sampled(workflow, "Picture", model, positive[0], negative[0], empty[0])
    saved(workflow, "Picture", latent, loader[2], "sdxl_report")
    report(workflow, model, latent)
    return workflow


def image_to_video(variant: str) -> Workflow:
    """From a picture to 25 frames, the number that this model was trained with."""
    note = f"25 frames of 1024 x 576.\n\n{notes(variant)}\nPut a picture of your own into Load Image."
    workflow = Workflow(f"SVD {VARIANTS[variant]}", note)
    loader = workflow.add("Model", "ImageOnlyCheckpointLoader", ckpt_name="svd_xt_1_1.safetensors")
    guided = workflow.add("Model", "VideoLinearCFGGuidance", model=loader, min_cfg=1.0)
    model = accelerated(workflow, variant, guided[0])
    start = workflow.add("First frame", "LoadImage", PREVIEW, image=PICTURE)
    conditioning = workflow.add(
        "First frame",
        "SVD_img2vid_Conditioning",
        clip_vision=loader[1],
        init_image=start,
        vae=loader[2],
        width=1024,
        height=576,
        video_frames=25,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    latent = sampled(
        workflow, "Video", model, *(conditioning[output] for output in range(3)), cfg=2.5, scheduler="karras"
    )
    frames = workflow.add("Video", "VAEDecode", samples=latent, vae=loader[2])
    workflow.add(
        "Video",
        "SaveAnimatedWEBP",
        PREVIEW,
        images=frames,
        filename_prefix=f"onlinequant/svd_{variant}",
        fps=6.0,
        lossless=False,
        quality=80,
        method="default",
    )
    return workflow


def lora_and_controlnet() -> Workflow:
    """SDXL with both, since both are where compiled models usually disappoint."""
    note = f"""\
{HOW_IT_GOES}
**Try it:** after the second run, move the strength of the LoRA, or load another one: the next picture follows at once.
The ControlNet is a model of its own, observed and compiled like the first, so it has a node of its own.
"""
    workflow = Workflow("SDXL 6 LoRA and ControlNet", note)
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    lora = workflow.add(
        "Model",
        "LoraLoader",
        model=loader[0],
        clip=loader[1],
        lora_name="sd_xl_offset_example-lora_1.0.safetensors",
        strength_model=0.5,
        strength_clip=1.0,
    )
    model = accelerated(workflow, "quantized", lora[0])
    control = workflow.add("ControlNet", "ControlNetLoader", control_net_name="diffusers_xl_canny_full.safetensors")
    control = workflow.add("ControlNet", "OnlineQuantControlNet", PROGRESS, control_net=control, **DEFAULTS)
    positive, negative = prompts(workflow, lora[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    drawn = workflow.add("Edges", "LoadImage", PREVIEW, image=PICTURE)
    edges = workflow.add("Edges", "Canny", image=drawn, low_threshold=0.4, high_threshold=0.8)
    applied = workflow.add(
        "Edges",
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=edges,
        strength=0.6,
        start_percent=0.0,
        end_percent=1.0,
        vae=loader[2],
    )
    latent = sampled(workflow, "Picture", model, applied[0], applied[1], empty[0])
    saved(workflow, "Picture", latent, loader[2], "sdxl_lora_controlnet")
    report(workflow, model, latent)
    return workflow


def comparison() -> Workflow:
    """SDXL twice from one seed: the one workflow that says what 8 bit costs in quality."""
    note = f"""\
Both pictures come from one seed, and Compare shows them beside their difference, with PSNR and SSIM.

{HOW_IT_GOES}
**So the first comparison shows no difference**: both pictures are drawn in float. Press Run again.
"""
    workflow = Workflow("SDXL 5 float and 8 bit compared", note)
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    model = accelerated(workflow, "quantized", loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    seed = workflow.add("Prompt", "PrimitiveInt", Look("Seed of both pictures"), value=SEED)
    decoded = []
    for group, denoiser in (("In float", loader[0]), ("In 8 bit", model)):
        latent = sampled(workflow, group, denoiser, positive[0], negative[0], empty[0], seed=seed[0])
        decoded.append(saved(workflow, group, latent, loader[2], f"sdxl_{group.lower().replace(' ', '_')}"))
    reference, picture = decoded
    workflow.add("Report", "OnlineQuantCompare", Look(room=400), picture=picture, reference=reference)
    report(workflow, model, picture, reference=reference)
    return workflow


# --- What they have in common ---


def notes(variant: str) -> str:
    """What to expect."""
    if variant == "quantized":
        return HOW_IT_GOES
    if variant == "compiled":
        return """\
ComfyUI's own compile node, with Inductor: the picture and the time to compare with. The first run compiles, after every
restart. The seed goes up by one each time, so press Run twice and look at the second time.
"""
    return """\
Nothing is compiled: the picture and the time to compare with. The seed goes up by one each time, and the compiled and
the quantized workflow begin with the same one.
"""


def accelerated(workflow: Workflow, variant: str, model: Link) -> Link:
    """The model as it is ("baseline"), with ComfyUI's own node ("compiled") or with ours ("quantized")."""
    if variant == "compiled":
        return workflow.add("Model", "TorchCompileModel", model=model, backend="inductor")[0]
    if variant == "quantized":
        return workflow.add("Model", "OnlineQuantModel", PROGRESS, model=model, **DEFAULTS, observe_again=0)[0]
    return model


def prompts(workflow: Workflow, clip: Link) -> tuple[Node, Node]:
    """What to draw, and what not."""
    positive = workflow.add("Prompt", "CLIPTextEncode", Look("What to draw"), clip=clip, text=PROMPT)
    negative = workflow.add("Prompt", "CLIPTextEncode", Look("What not to draw"), clip=clip, text=UNWANTED)
    return positive, negative


def sampled(
    workflow: Workflow,
    group: str,
    model: Link,
    positive: Link,
    negative: Link,
    latent: Link,
    *,
    cfg: float = 8.0,
    scheduler: str = "normal",
    seed: int | Link = SEED,
) -> Link:
    """20 steps of Euler, as the predecessor's workflows had."""
    sampler = workflow.add(
        group,
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=20,
        cfg=cfg,
        sampler_name="euler",
        scheduler=scheduler,
        denoise=1.0,
    )
    return sampler[0]


def saved(workflow: Workflow, group: str, latent: Link, vae: Link, name: str) -> Link:
    """The decoded picture, which is also saved."""
    picture = workflow.add(group, "VAEDecode", samples=latent, vae=vae)
    workflow.add(group, "SaveImage", PREVIEW, images=picture, filename_prefix=f"onlinequant/{name}")
    return picture[0]


def report(workflow: Workflow, model: Link, picture: Link, **reference: Link) -> None:
    """What became of each layer, as a chart and as a table; it waits for ``picture``."""
    made = workflow.add(
        "Report", "OnlineQuantReport", Look(room=560, width=900), model=model, picture=picture, **reference
    )
    workflow.add("Report", "PreviewAny", Look("Every layer and why", room=320), source=made)


def workflows() -> dict[str, Workflow]:
    """All of them, by the names of their files in the API's format."""
    made = {}
    for variant in ("baseline", "compiled", "quantized"):
        made[f"sdxl_{variant}"] = text_to_image("SDXL", variant, "sd_xl_base_1.0.safetensors", 1024)
        made[f"sd15_{variant}"] = text_to_image("SD15", variant, "v1-5-pruned-emaonly.safetensors", 512)
        made[f"svd_{variant}"] = image_to_video(variant)
    more = {"sdxl_report": reported(), "sdxl_compare": comparison(), "sdxl_lora_controlnet": lora_and_controlnet()}
    return {**made, **more}


# --- The formats ---


def api_format(workflow: Workflow) -> dict[str, Any]:
    """What a program posts to ComfyUI."""
    return {
        str(node.id): {
            "inputs": {
                name: [str(value.node), value.output] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            "class_type": node.kind,
            **({"_meta": {"title": node.look.title}} if node.look.title else {}),
        }
        for node in workflow.nodes
    }


TITLE, PADDING = 30, 20
SPACE = 60  # between columns, and between the nodes of one: badges and the text of errors need it
SLOT, WIDGET, TEXT, MARGIN = 20, 28, 120, 40
NOTE = (420, 520)
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
Schema: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass
class Column:
    """The nodes of a group, one below the other."""

    left: int
    width: int
    bottom: int = 0

    def placed(self, height: int) -> int:
        """Where the next node begins, below its title."""
        top = self.bottom + (SPACE if self.bottom else TITLE)
        self.bottom = top + height
        return top

    @property
    def frame(self) -> list[int]:
        """Around all of them, with room for the group's own title."""
        above = TITLE + PADDING
        return [self.left - PADDING, -above, self.width + 2 * PADDING, above + self.bottom + PADDING]


def ui_format(workflow: Workflow, schemas: Mapping[str, Schema]) -> dict[str, Any]:
    """What people open, LiteGraph's format 0.4: the note on the left, then a column for each group.

    ``schemas``: what ComfyUI answers to ``/object_info``.
    """
    nodes: dict[int, dict[str, Any]] = {}
    links: list[list[Any]] = []
    columns = _columns(workflow.nodes)
    for node in workflow.nodes:
        schema = schemas[node.kind]
        inputs, values = _inputs(node, schema)
        height = node.look.room + _height(inputs, values, schema)
        column = columns[node.group]
        for slot, entry in enumerate(inputs):
            link = node.inputs.get(entry["name"])
            if isinstance(link, Link):
                output = nodes[link.node]["outputs"][link.output]
                links.append([len(links) + 1, link.node, link.output, node.id, slot, output["type"]])
                entry["link"] = len(links)
                output["links"].append(len(links))
        nodes[node.id] = {
            "id": node.id,
            "type": node.kind,
            **({"title": node.look.title} if node.look.title else {}),
            "pos": [column.left, column.placed(height)],
            "size": [column.width, height],
            "flags": {},
            "order": len(nodes),
            "mode": 0,
            "inputs": inputs,
            "outputs": [
                {"name": name, "type": kind, "links": []}
                for name, kind in zip(schema["output_name"], schema["output"], strict=True)
            ],
            "properties": {"Node name for S&R": node.kind, **_models(node)},
            "widgets_values": values,
        }
    note = {
        "id": len(nodes) + 1,
        "type": "MarkdownNote",
        "title": "Read me",
        "pos": [0, TITLE],
        "size": [*NOTE],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [workflow.note],
    }
    return {
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": [*nodes.values(), note],
        "links": links,
        "groups": [
            {"id": number, "title": title, "bounding": column.frame, "color": "#3f789e", "font_size": 24, "flags": {}}
            for number, (title, column) in enumerate(columns.items(), 1)
        ],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _columns(nodes: Iterable[Node]) -> dict[str, Column]:
    """An empty column for each group, from left to right beside the note."""
    widths: dict[str, int] = {}
    for node in nodes:
        widths[node.group] = max(node.look.width, widths.get(node.group, 0))
    columns, left = {}, NOTE[0] + SPACE
    for group, width in widths.items():
        columns[group] = Column(left, width)
        left += width + SPACE
    return columns


def _inputs(node: Node, schema: Schema) -> tuple[list[dict[str, Any]], list[Value]]:
    """The inputs, sockets first, and the values of all widgets, also of those that only the front end knows."""
    sockets: list[dict[str, Any]] = []
    widgets: list[dict[str, Any]] = []
    values: list[Value] = []
    known = _known(schema)
    if unknown := node.inputs.keys() - known.keys():
        raise KeyError(f"{node.kind} has no {', '.join(sorted(unknown))}")
    for name, (kind, options) in known.items():
        entry = {"name": name, "type": kind, "link": None}
        if kind not in WIDGETS or options.get("forceInput"):
            sockets.append(entry)
            continue
        value = node.inputs[name]
        widgets.append({**entry, "widget": {"name": name}})
        values.append(options["default"] if isinstance(value, Link) else value)
        if options.get("control_after_generate"):
            values.append("increment")  # a workflow that did not change would not run again
        if options.get("image_upload"):
            values.append("image")
    return [*sockets, *widgets], values


def _known(schema: Schema) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Type and options of each input; a list instead of a type holds the choices."""
    known = {}
    for section in ("required", "optional"):
        for name in schema["input_order"].get(section, []):
            kind, *options = schema["input"][section][name]
            known[name] = ("COMBO" if isinstance(kind, list) else kind, options[0] if options else {})
    return known


def _height(inputs: list[dict[str, Any]], values: list[Value], schema: Schema) -> int:
    """What the front end needs at least; it enlarges a smaller node, over others if need be."""
    texts = sum(bool(options.get("multiline")) for _, options in _known(schema).values())
    slots = max(sum("widget" not in entry for entry in inputs), len(schema["output"]))
    return MARGIN + SLOT * slots + WIDGET * len(values) + TEXT * texts


def _models(node: Node) -> dict[str, Any]:
    """Where the files that a node loads can be found."""
    files = [
        {"name": name, "url": f"https://huggingface.co/{repository}/resolve/main/{name}", "directory": directory}
        for name, (directory, repository) in MODELS.items()
        if name in node.inputs.values()
    ]
    return {"models": files} if files else {}


# --- The pictures that ComfyUI lists them with ---

THUMBNAIL, CAPTION = (640, 400), 110
NODE_COLOURS = {"OnlineQuant": "#1f6fb4", "TorchCompile": "#8a6fb4", "KSampler": "#e07b28", "MarkdownNote": "#2a2a2a"}


def thumbnail(title: str, graph: Mapping[str, Any]) -> Image.Image:
    """The graph in small, with what makes the difference in colour, below its title."""
    picture = Image.new("RGB", THUMBNAIL, "#1e1e1e")
    draw = ImageDraw.Draw(picture)
    model, number, what = title.split(" ", 2)
    draw.text((28, 20), f"{model}  {number}", "#9a9a9a", ImageFont.load_default(26))
    draw.text((28, 52), what, "white", ImageFont.load_default(36))
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in graph["nodes"]}
    right, bottom = (max(box[i] + box[i + 2] for box in boxes.values()) for i in (0, 1))
    scale = min((THUMBNAIL[0] - 56) / right, (THUMBNAIL[1] - CAPTION - 28) / bottom)

    def at(x: float, y: float) -> tuple[float, float]:
        return 28 + x * scale, CAPTION + y * scale

    for _, origin, _, target, *_ in graph["links"]:
        (x, y, width, _), (to_x, to_y, *_) = boxes[origin], boxes[target]
        draw.line((at(x + width, y + 20), at(to_x, to_y + 20)), "#6a6a6a", 2)
    for node in graph["nodes"]:
        x, y, width, height = boxes[node["id"]]
        colour = next((each for kind, each in NODE_COLOURS.items() if node["type"].startswith(kind)), "#4a4a4a")
        draw.rounded_rectangle((at(x, y), at(x + width, y + height)), 5, colour)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the example workflows.")
    parser.add_argument("url", nargs="?", help="a running ComfyUI, for the UI format; without it, API format only")
    url = parser.parse_args().url
    schemas = None
    if url is not None:
        with urllib.request.urlopen(f"{url.rstrip('/')}/object_info") as reply:
            schemas = json.load(reply)
    for name, workflow in workflows().items():
        _write(HERE / "api" / f"{name}.json", api_format(workflow))
        if schemas is not None:
            graph = ui_format(workflow, schemas)
            _write(HERE / f"{workflow.title}.json", graph)
            thumbnail(workflow.title, graph).save(HERE / f"{workflow.title}.jpg", quality=85)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
