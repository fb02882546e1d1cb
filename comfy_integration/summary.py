"""The outputs of the Report node for a snapshot of a model: a line, a text table and a chart."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageColor, ImageDraw, ImageFont

from onlinequant_backend import Report
from onlinequant_backend.report.decision import KINDS, NodeDecision
from onlinequant_backend.report.plot import COLOURS, draw_layers

from .record import FLOAT, OBSERVED, QUANTIZED, Pace, Snapshot

_KINDS = {FLOAT: "in float", OBSERVED: "in float, observed", QUANTIZED: "in 8 bit"}
_COLOURS = {FLOAT: COLOURS["float"], OBSERVED: COLOURS["float"], QUANTIZED: COLOURS["8 bit"]}
_DPI = 130
_HEIGHT, _SPEEDS, _LAYERS = 715, 325, 975  # pixels: of both panels, and their widths


def speed(snapshot: Snapshot) -> str:
    """One line: the times of each kind of step, their numbers, and the speedup."""
    parts = [
        f"{name}: {_milliseconds(pace)}, {_steps(pace)}"
        for kind, name in _KINDS.items()
        if (pace := snapshot.paces.get(kind)) is not None
    ]
    gain = [] if snapshot.gain is None else [f"{snapshot.gain:.2g}x"]
    return f"a step {'; '.join([*parts, *gain]) or 'was not timed yet'}"


def table(snapshot: Snapshot, difference: str | None) -> str:
    """Speed, the difference from the float picture, and every graph's report, in plain text of 120 columns."""
    head = [speed(snapshot), f"difference from the float image: {difference or 'connect both images to compare them'}"]
    # A path on the server is of no use in a browser.
    reports = [dataclasses.replace(report, stats_path=None) for report in snapshot.reports]
    return "\n\n".join(["\n".join(head), *(report.table() for report in reports)])


def headline(snapshot: Snapshot, difference: str | None = None) -> str:
    """One line for the node: more would take space from the chart."""
    reports = dict.fromkeys(report.summary() for report in snapshot.reports)
    return " · ".join(filter(None, [*reports, *snapshot.warnings(), speed(snapshot), difference]))


def chart(snapshot: Snapshot) -> Image.Image:
    """The step times as bars, and the layers of the graph with the most layers."""
    picture = Image.new("RGB", (_SPEEDS + _LAYERS, _HEIGHT), "white")
    _draw_speeds(ImageDraw.Draw(picture), snapshot)
    if snapshot.reports:
        report = max(snapshot.reports, key=lambda report: len(report.decisions))
        thresholds = [f"{kind}_compute_density_threshold" for kind in KINDS]
        config = tuple((name, report.config.get(name)) for name in thresholds)
        picture.paste(_layers(report.model, report.phase, tuple(report.decisions), config), (_SPEEDS, 0))
    return picture


def as_image(picture: Image.Image) -> torch.Tensor:
    """An image in ComfyUI's format, [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, np.float32)[None] / 255)


def save(picture: Image.Image, folder: Path) -> str:
    """Write a PNG into ``folder`` and return its name; an existing one is not written again."""
    # With a palette the file has a third of the size and is written in a seventh of the time.
    small = picture.quantize(palette=_palette(), dither=Image.Dither.NONE)
    name = f"onlinequant_report_{hashlib.sha1(small.tobytes(), usedforsecurity=False).hexdigest()}.png"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        small.save(folder / name, compress_level=1)
    return name


def warm_up() -> None:
    """Initialise matplotlib, such as its font cache, which takes seconds the first time."""
    _layers("", "", (), ())


@functools.lru_cache(maxsize=8)
def _layers(
    model: str, phase: str, decisions: tuple[NodeDecision, ...], config: tuple[tuple[str, Any], ...]
) -> Image.Image:
    """The panel of the layers; cached, since drawing hundreds of layers takes half a second and they seldom change."""
    figure = Figure(figsize=(_LAYERS / _DPI, _HEIGHT / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw_layers(figure, Report(model, phase=phase, decisions=list(decisions), config=dict(config)))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_speeds(draw: ImageDraw.ImageDraw, snapshot: Snapshot) -> None:
    """Draw the step times, which change with every image, without matplotlib: this takes a hundredth of the time."""
    shown: Mapping[str, Pace] = {kind: snapshot.paces[kind] for kind in _KINDS if kind in snapshot.paces}
    gain = "" if snapshot.gain is None else f": {snapshot.gain:.2g}x"
    title = f"a step{gain}" if shown else "not sampled with yet"
    draw.text((_SPEEDS / 2, 20), title, "black", _font(23, "-Bold"), anchor="mm")
    top, bottom, column = 90, _HEIGHT - 90, _SPEEDS / max(len(shown), 1)
    tallest = max((pace.milliseconds for pace in shown.values()), default=1)
    for number, (kind, pace) in enumerate(shown.items()):
        middle, half = column * (number + 0.5), min(column * 0.38, 55)
        height = (bottom - top) * pace.milliseconds / tallest
        draw.rectangle((middle - half, bottom - height, middle + half, bottom), _COLOURS[kind])
        draw.text((middle, bottom - height - 6), _milliseconds(pace), "black", _font(17), anchor="mb")
        label = f"{_KINDS[kind]}\n{_steps(pace)}".replace(", ", ",\n")
        draw.multiline_text((middle, bottom + 10), label, "black", _font(16), anchor="ma", align="center")
    draw.line((12, bottom, _SPEEDS - 12, bottom), "black")


def _milliseconds(pace: Pace) -> str:
    return f"{pace.milliseconds:.0f} ms" if pace.milliseconds >= 100 else f"{pace.milliseconds:.3g} ms"


def _steps(pace: Pace) -> str:
    return f"{pace.steps} step{'s' * (pace.steps != 1)}"


@functools.cache
def _palette() -> Image.Image:
    """From white to each colour of the chart."""
    colours = [ImageColor.getrgb(colour) for colour in ("black", *dict.fromkeys(COLOURS.values()))]
    shades = [[255 + (value - 255) * step // 15 for value in colour] for colour in colours for step in range(16)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(list(itertools.chain.from_iterable(shades)))
    return palette


@functools.cache
def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    """Matplotlib's font, as in the other panel."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{style}.ttf"), size)
