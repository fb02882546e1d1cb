"""A report as a picture: where every layer lies between worth quantizing and safe to quantize."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from .decision import NodeDecision
    from .report import Report

# Blue and orange differ in lightness too, so the picture survives a grey print and colour blindness.
COLOURS = {"8 bit": "#1f6fb4", "candidate": "#7fb8e6", "chosen": "#7fb8e6", "float": "#e07b28"}
_ORDER = ("float", "candidate", "chosen", "8 bit")
_MARKERS = {"conv": "o", "linear": "^", "attention": "s"}
_ROWS = {"conv": 2.0, "linear": 1.0, "attention": 0.0}
_THRESHOLD_STYLES = {"conv": (0, (6, 3)), "linear": (0, (2, 2))}


def plot_layers(report: Report, path: str | os.PathLike[str]) -> None:
    """``draw_layers`` into the PNG ``path``; raises OSError where that cannot be written.

    Neither pyplot nor matplotlib's global backend is touched.
    """
    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    draw_layers(figure, report)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def draw_layers(figure: FigureBase, report: Report) -> None:
    """Draw compute density (x) against sensitivity (y), one mark a layer, into an empty ``figure``.

    Layers without a measured sensitivity, or with one of 0, lie on a rug below the axes.
    """
    scatter, rug = figure.subplots(2, 1, sharex=True, height_ratios=(9, 1))
    scatter.set(xscale="log", yscale="log")  # before any mark: axes without one could not change their scale
    measured = [decision for decision in report.decisions if decision.sensitivity and decision.density > 0]
    others = [decision for decision in report.decisions if not decision.sensitivity and decision.density > 0]
    _draw_marks(scatter, report, measured, [decision.sensitivity or 0.0 for decision in measured])
    _draw_marks(rug, report, others, [_ROWS[decision.kind] for decision in others])
    if not measured:
        scatter.set_ylim(0.001, 0.1)
    if not measured and not others:
        scatter.set_xlim(1, 1000)
    _draw_thresholds((scatter, rug), report)
    _label(figure, scatter, rug, report)


def _draw_marks(axes: Axes, report: Report, decisions: Sequence[NodeDecision], heights: Sequence[float]) -> None:
    standings = list(map(report.standing, decisions))
    for standing in _ORDER:
        for kind, marker in _MARKERS.items():
            chosen = [i for i, d in enumerate(decisions) if standings[i] == standing and d.kind == kind]
            axes.scatter(
                [decisions[i].density for i in chosen],
                [heights[i] for i in chosen],
                s=42,
                marker=marker,
                color=COLOURS[standing],
                alpha=0.75,
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
            )


def _thresholds(report: Report) -> dict[str, float]:
    """The density threshold of each kind, where the options hold one that a logarithmic axis can show."""
    values = {kind: report.config.get(f"{kind}_compute_density_threshold") for kind in _THRESHOLD_STYLES}
    return {kind: float(value) for kind, value in values.items() if value}


def _draw_thresholds(all_axes: Sequence[Axes], report: Report) -> None:
    for kind, threshold in _thresholds(report).items():
        for axes in all_axes:
            axes.axvline(threshold, color="#555555", linewidth=1.1, linestyle=_THRESHOLD_STYLES[kind], zorder=1)


def _label(figure: FigureBase, scatter: Axes, rug: Axes, report: Report) -> None:
    figure.suptitle(f"{report.model}: {report.headline()}", fontsize=13, fontweight="bold")
    scatter.set_ylabel("sensitivity: relative error of the output in 8 bit")
    rug.set(xlabel="compute density (FLOPs per byte)", ylim=(-0.7, 2.7))
    rug.set_yticks(list(_ROWS.values()), list(_ROWS))
    rug.set_ylabel("not\nmeasured", rotation=0, ha="right", va="center", labelpad=12)
    rug.xaxis.set_minor_formatter(NullFormatter())
    rug.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Sensitivities span about a decade: powers of ten alone would leave the axis without numbers.
    scatter.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scatter.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scatter.yaxis.set_minor_formatter(NullFormatter())
    for axes in (scatter, rug):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(which="major", color="#e4e4e4", linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
    scatter.legend(handles=_legend(report), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=10)


def _legend(report: Report) -> list[Line2D]:
    shown = {"float", *map(report.standing, report.decisions)}
    if len(shown) == 1:
        shown.add("8 bit")
    marks = [
        Line2D([], [], linestyle="", marker=marker, markersize=7, color=COLOURS[standing], label=f"{kind}, {standing}")
        for standing in reversed(_ORDER)
        if standing in shown
        for kind, marker in _MARKERS.items()
    ]
    lines = [
        Line2D([], [], color="#555555", linestyle=_THRESHOLD_STYLES[kind], label=f"{kind} threshold, {threshold:g}")
        for kind, threshold in _thresholds(report).items()
    ]
    return [*marks, *lines]
