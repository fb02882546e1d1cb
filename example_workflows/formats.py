"""A workflow in ComfyUI's two formats: the API's, which programs post, and the front end's, which people open.

In the second one a group becomes a column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from example_workflows.workflow import Link, Node, Value, Workflow

# Each file that a workflow loads: its folder in `models` and its home, for ComfyUI's list of missing models.
MODELS = {
    "sd_xl_base_1.0.safetensors": ("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0"),
    "v1-5-pruned-emaonly.safetensors": ("checkpoints", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "svd_xt_1_1.safetensors": ("checkpoints", "stabilityai/stable-video-diffusion-img2vid-xt-1-1"),
    "sd_xl_offset_example-lora_1.0.safetensors": ("loras", "stabilityai/stable-diffusion-xl-base-1.0"),
    "diffusers_xl_canny_full.safetensors": ("controlnet", "lllyasviel/sd_control_collection"),
}


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
