"""The pictures that ComfyUI lists the example workflows with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont

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
