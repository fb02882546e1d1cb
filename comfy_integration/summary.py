"""What the Report node shows of a model's record: a text table and a chart."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from onlinequant_backend.plot import draw_layers

from .record import Record

_PHASES = {"float": "in float", "calibrating": "in float, observed", "quantized": "in 8 bit"}
_COLOURS = {"float": "#e07b28", "calibrating": "#e07b28", "quantized": "#1f6fb4"}


def speed(record: Record) -> str:
    """One line: how long a call of the model took in each phase, as seen while sampling."""
    seen = record.milliseconds()
    parts = [f"{seen[phase]:.4g} ms {name}" for phase, name in _PHASES.items() if phase in seen]
    return f"a call of the model: {' and '.join(parts) or 'not timed yet'}"


def table(record: Record, difference: str | None) -> str:
    """Speed, the difference from the float picture, and every graph's report, in plain text of 120 columns."""
    head = [speed(record), f"the picture against float's: {difference or 'connect both to have them compared'}"]
    # Whoever looks at this in a browser has no use for a path of the server's.
    reports = [dataclasses.replace(report, stats_path=None) for report in record.reports]
    return "\n\n".join(["\n".join(head), *(report.table() for report in reports)])


def chart(record: Record) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1]: the speeds as bars, and the layers of the graph that has most."""
    figure = Figure(figsize=(10, 5.5), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 3))
    _draw_speeds(figure.add_subfigure(grid[0]), record)
    if record.reports:
        draw_layers(figure.add_subfigure(grid[1]), max(record.reports, key=lambda report: len(report.decisions)))
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[None, ..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def _draw_speeds(figure: SubFigure, record: Record) -> None:
    axes = figure.subplots()
    seen = record.milliseconds()
    shown = [phase for phase in _PHASES if phase in seen]
    heights = [seen[phase] for phase in shown]
    bars = axes.bar([_PHASES[phase].replace(", ", ",\n") for phase in shown], heights, width=0.6)
    for bar, phase in zip(bars, shown, strict=True):
        bar.set_color(_COLOURS[phase])
    axes.bar_label(bars, [f"{height:.4g}" for height in heights], padding=3)
    axes.set(ylabel="milliseconds", xlim=(-0.7, max(len(shown), 1) - 0.3))
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("a call of the model" if shown else "not sampled with yet", fontsize=13, fontweight="bold")


def headline(record: Record, difference: str | None = None) -> str:
    """What fits on the node, in one line: it takes room from the chart."""
    return " · ".join(filter(None, [*record.summaries(), speed(record), difference]))
