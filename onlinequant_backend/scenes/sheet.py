"""Pictures and their captions on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

_INCHES = 1.25  # of a picture
_LETTERS = 25  # that fit below one, at the size below


def save_sheet(path: Path, rows: Mapping[str, torch.Tensor], captions: Sequence[str], columns: int = 8) -> None:
    """Write a PNG with each caption below its pictures: the first of every row, the second of every row, ...

    ``rows``: by name, pictures [N, 3, H, W] in [-1, 1]. After ``columns`` captions it goes on below. Raises OSError
    where ``path`` cannot be written.
    """
    count = len(captions)
    bands = -(-count // columns)
    figure = Figure(
        figsize=(_INCHES * columns + 0.7, bands * (_INCHES * len(rows) + 0.95)), dpi=100, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for band, part in enumerate(figure.subfigures(bands, 1, squeeze=False)[:, 0]):
        shown = range(band * columns, min((band + 1) * columns, count))
        _draw_band(part, {name: pictures[shown.start : shown.stop] for name, pictures in rows.items()}, columns)
        for axes, index in zip(part.axes[-columns:], shown, strict=False):
            axes.set_xlabel("\n".join(textwrap.wrap(captions[index], _LETTERS)), fontsize=6.5)
    figure.savefig(path, format="png")


def _draw_band(part: SubFigure, rows: Mapping[str, torch.Tensor], columns: int) -> None:
    grid = part.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=8)
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
