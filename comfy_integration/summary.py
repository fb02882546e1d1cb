"""What the Report node shows of a model's record: a text table and a chart."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from onlinequant_backend import Report
from onlinequant_backend.plot import draw_layers

from .record import Record

_PHASES = {"float": "in float", "calibrating": "observed, in float", "quantized": "in 8 bit"}
_COLOURS = {"float": "#e07b28", "calibrating": "#e07b28", "quantized": "#1f6fb4"}


def speed(record: Record) -> str:
    """One line: how long a call of the model took in each phase, as seen while sampling."""
    seen = {phase: ms for phase, ms in record.milliseconds().items() if phase in _PHASES}
    if not seen:
        return "a call of the model: not timed yet"
    parts = [f"{seen[phase]:.4g} ms {name}" for phase, name in _PHASES.items() if phase in seen]
    slow = seen.get("float", seen.get("calibrating"))
    ratio = f" ({slow / seen['quantized']:.2f}x as fast)" if slow and "quantized" in seen else ""
    return f"a call of the model: {', '.join(parts)}{ratio}"


def table(record: Record, difference: str | None) -> str:
    """Speed, the difference from the float picture, and every graph's report, in plain text of 120 columns."""
    head = [speed(record), f"the picture against float's: {difference or 'connect both to have them compared'}"]
    return "\n\n".join(["\n".join(head), *(report.table() for report in record.reports)])


def chart(record: Record) -> torch.Tensor:
    """[1, H, W, 3] in [0, 1]: the speeds as bars, and the layers of the graph that has most."""
    figure = Figure(figsize=(13, 6.5), dpi=100, layout="constrained")
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


def headline(record: Record) -> str:
    """What fits on the node: a line a graph, and the speed."""
    return "\n".join([*_lines(record.reports), speed(record)])


def _lines(reports: list[Report]) -> list[str]:
    return list(dict.fromkeys(report.summary() for report in reports))
