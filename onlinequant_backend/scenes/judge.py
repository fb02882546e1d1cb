"""Whether a picture shows what its caption says: shapes are found by least squares, nothing is learned."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .drawing import PICTURE_SIZE, coverage
from .scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, codes, parse

# In units of colour, where black to white is 1. No two colours that can meet are nearer to each other than 0.4.
FAINTEST = 0.2  # what differs less from the background is none of the things
COLOUR_TOLERANCE, BACKGROUND_TOLERANCE = 0.25, 0.15
# What may be left unexplained of a quarter of a picture: squared colour, summed over its pixels, and a share of what
# the thing in it explains, since a bigger one has more of an outline.
REST, REST_OF_THING = 5.0, 0.1
EMPTY, UNREADABLE = -1, -2

_QUARTER = PICTURE_SIZE // 2
_OFFSETS = torch.arange(
    -3, 3.5, 0.5, dtype=torch.float32, device="cpu"
)  # pixels from a place's centre; half the step is the largest error
_CHUNK = 250  # pictures; bounds memory


def matches(picture: torch.Tensor, caption: str) -> bool:
    """Whether ``picture``, [3, 64, 64] in [-1, 1], shows what ``caption`` says and nothing else."""
    return bool(correct(picture[None], [caption])[0])


def score(pictures: torch.Tensor, captions: Sequence[str]) -> float:
    """The share of ``pictures``, [N, 3, 64, 64] in [-1, 1], that show what their captions say and nothing else."""
    return correct(pictures, captions).float().mean().item()


def correct(pictures: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
    """For each picture whether it shows what its caption says, bool [N].

    Raises ValueError for what is no caption of a scene, and where there are not as many captions as pictures.
    """
    if len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions")
    return (read(pictures) == _expected([parse(text) for text in captions])).all(1)


def read(pictures: torch.Tensor) -> torch.Tensor:
    """What pictures show, int64 [N, 1 + 4 * 3]: the background; shape, colour and size at each of ``PLACES``.

    Indices into ``BACKGROUNDS``, ``SHAPES``, ``COLOURS`` and ``SIZES``, or ``EMPTY`` or ``UNREADABLE``.
    """
    chunks = pictures.detach().cpu().float().split(_CHUNK)
    return torch.cat([_read((chunk + 1) / 2) for chunk in chunks])


def _read(pictures: torch.Tensor) -> torch.Tensor:
    """``read`` for pictures in [0, 1]."""
    frame = torch.cat([pictures[:, :, [0, -1]].flatten(2), pictures[:, :, :, [0, -1]].flatten(2)], 2)
    behind = frame.median(2).values  # no thing reaches the frame
    background = _nearest(behind, [*BACKGROUNDS.values()], BACKGROUND_TOLERANCE)
    left = pictures - behind[:, :, None, None]
    # [N, 4, 3, pixels], the quarters in the order of PLACES.
    quarters = left.unfold(2, _QUARTER, _QUARTER).unfold(3, _QUARTER, _QUARTER).permute(0, 2, 3, 1, 4, 5)
    kind, size, contrast, rest = _fit(quarters.reshape(-1, 3, _QUARTER**2))
    colour = _nearest(behind.repeat_interleave(len(PLACES), 0) + contrast, [*COLOURS.values()], COLOUR_TOLERANCE)
    things = torch.stack([kind, colour, size], 1)
    things[contrast.norm(dim=1) < FAINTEST] = EMPTY
    things[rest > 1] = UNREADABLE
    return torch.cat([background[:, None], things.view(len(pictures), -1)], 1)


def _fit(quarters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The thing that explains each quarter [M, 3, pixels] best, in whatever colour does so.

    Its shape and size, int64 [M]; its colour less the background's, [M, 3]; and what it leaves unexplained, [M], as a
    multiple of what may be.
    """
    templates, kinds, sizes = _templates()
    # Least squares: |q - T c|^2 is least for c = <q, T> / <T, T>, and then it is |q|^2 - <q, T>^2 / <T, T>.
    products = quarters @ (templates / templates.norm(dim=0))
    explained, best = products.square().sum(1).max(1)
    contrast = (
        products[torch.arange(len(best), dtype=torch.int64, device="cpu"), :, best] / templates.norm(dim=0)[best, None]
    )
    is_empty = contrast.norm(dim=1) < FAINTEST
    explained = explained.masked_fill(is_empty, 0)
    rest = (quarters.square().sum((1, 2)) - explained) / (REST + REST_OF_THING * explained)
    return kinds[best], sizes[best], contrast, rest


@functools.cache
def _templates() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How much of a quarter's pixels things cover, [pixels, T], and their shapes and sizes, int64 [T]."""
    lengths = (len(SHAPES), len(SIZES), len(_OFFSETS), len(_OFFSETS))
    grid = torch.cartesian_prod(*[torch.arange(length, dtype=torch.int64, device="cpu") for length in lengths])
    kinds, sizes, across, down = grid.unbind(1)
    centre = _QUARTER / 2 + torch.stack([_OFFSETS[across], _OFFSETS[down]], 1)
    radii = torch.tensor([*SIZES.values()], dtype=torch.float32, device="cpu")
    cover = coverage(kinds, radii[sizes], centre, _QUARTER)
    return cover.flatten(1).T.contiguous(), kinds, sizes


def _nearest(values: torch.Tensor, palette: Sequence[tuple[float, ...]], tolerance: float) -> torch.Tensor:
    """The index of the colour of ``palette`` nearest to each of ``values`` [N, 3], or ``UNREADABLE``."""
    distance, index = torch.cdist(values, torch.tensor(palette, dtype=torch.float32, device="cpu")).min(1)
    return index.masked_fill(distance > tolerance, UNREADABLE)


def _expected(scenes: Sequence[Scene]) -> torch.Tensor:
    """What ``read`` should return."""
    places = torch.full((len(scenes), len(PLACES), 3), EMPTY, dtype=torch.int64, device="cpu")
    code = codes(scenes)
    things = code[:, 1:].view(len(scenes), -1, 4)
    row, index = (things[:, :, 0] >= 0).nonzero(as_tuple=True)
    shape, colour, size, place = things[row, index].unbind(1)
    places[row, place] = torch.stack([shape, colour, size], 1)
    return torch.cat([code[:, :1], places.flatten(1)], 1)
