"""Scenes of one or two things, their captions, their pictures, and which of them are kept out of training."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .drawing import DISTANCES, coverage, paint

# Red, green and blue in [0, 1].
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.20, 0.35, 0.90),
    "yellow": (0.95, 0.80, 0.15),
    "purple": (0.60, 0.20, 0.75),
    "cyan": (0.25, 0.80, 0.85),
}
BACKGROUNDS = {"black": (0.08, 0.08, 0.08), "grey": (0.50, 0.50, 0.50), "white": (0.95, 0.95, 0.95)}
# Radii, centres (right, down) and how far from these a thing may lie, in pixels of a picture of 64 x 64.
SIZES = {"small": 8.0, "large": 13.0}
PLACES = {
    "top left": (16.0, 16.0),
    "top right": (48.0, 16.0),
    "bottom left": (16.0, 48.0),
    "bottom right": (48.0, 48.0),
}
JITTER = 2.0
SHAPES = tuple(DISTANCES)


@dataclass(frozen=True)
class Thing:
    """One shape of a picture: keys of ``SHAPES``, ``COLOURS``, ``SIZES`` and ``PLACES``."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two things in different places, in the order in which they are named, on one of ``BACKGROUNDS``."""

    background: str
    things: tuple[Thing, ...]


def every_scene() -> Iterator[Scene]:
    """All scenes that there are: 720 of one thing and 129,600 of two."""
    things = [Thing(*names) for names in itertools.product(SHAPES, COLOURS, SIZES, PLACES)]
    for background in BACKGROUNDS:
        yield from (Scene(background, (thing,)) for thing in things)
        pairs = itertools.permutations(things, 2)
        yield from (Scene(background, pair) for pair in pairs if pair[0].place != pair[1].place)


def random_scene(generator: torch.Generator) -> Scene:
    """One thing or, twice as often, two. ``generator``: of the CPU."""

    def draw_from(names: Sequence[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=generator, dtype=torch.int64, device="cpu"))]

    order = torch.randperm(len(PLACES), generator=generator, dtype=torch.int64, device="cpu")
    places = order[: 1 + bool(torch.rand((), generator=generator, dtype=torch.float32, device="cpu") < 2 / 3)]
    things = tuple(
        Thing(draw_from(SHAPES), draw_from([*COLOURS]), draw_from([*SIZES]), [*PLACES][place]) for place in places
    )
    return Scene(draw_from([*BACKGROUNDS]), things)


def caption(scene: Scene) -> str:
    """``a grey background with a large red ring at the top left and a small blue cross at the bottom right``."""
    things = (f"a {thing.size} {thing.colour} {thing.shape} at the {thing.place}" for thing in scene.things)
    return f"a {scene.background} background with {' and '.join(things)}"


def parse(text: str) -> Scene:
    """The scene of a caption. Raises ValueError for what ``caption`` would not have written."""
    try:
        _, background, _, _, *rest = text.split()
        things = tuple(_parse_thing(phrase) for phrase in " ".join(rest).split(" and "))
        scene = Scene(background, things)
    except ValueError:
        raise ValueError(f"{text!r} is not a caption such as {caption.__doc__}") from None
    if background not in BACKGROUNDS or caption(scene) != text:
        raise ValueError(f"{text!r} is not a caption such as {caption.__doc__}")
    return scene


def _parse_thing(phrase: str) -> Thing:
    _, size, colour, shape, _, _, *place = phrase.split()
    thing = Thing(shape, colour, size, " ".join(place))
    if shape not in SHAPES or colour not in COLOURS or size not in SIZES or thing.place not in PLACES:
        raise ValueError(phrase)
    return thing


def is_held_out(text: str) -> bool:
    """Whether a caption is kept out of training: it names a shape of a colour where training never shows that one.

    These are 16 of 120 combinations, spread so that each shape of each colour is seen at three or all of the places.
    """
    return any(
        (5 * SHAPES.index(thing.shape) + 7 * [*COLOURS].index(thing.colour) + 3 * [*PLACES].index(thing.place)) % 8 == 0
        for thing in parse(text).things
    )


def captions(count: int, seed: int, held_out: bool | None = None) -> list[str]:
    """``count`` random captions, which may come more than once; with ``held_out`` only such, or none of these."""
    generator = torch.Generator().manual_seed(seed)
    endless = (caption(random_scene(generator)) for _ in itertools.count())
    wanted = (text for text in endless if held_out is None or is_held_out(text) == held_out)
    return list(itertools.islice(wanted, count))


def codes(scenes: Sequence[Scene]) -> torch.Tensor:
    """Scenes as numbers, int64 [N, 1 + 2 * 4]: background, then shape, colour, size and place of each thing, or -1."""
    rows = []
    for scene in scenes:
        row = [[*BACKGROUNDS].index(scene.background)]
        for thing in scene.things:
            row += [SHAPES.index(thing.shape), [*COLOURS].index(thing.colour)]
            row += [[*SIZES].index(thing.size), [*PLACES].index(thing.place)]
        rows.append(row + [-1] * (9 - len(row)))
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def draw_codes(code: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in [-1, 1] of what ``codes`` says, on its device.

    With a ``generator`` of that device each thing lies up to ``JITTER`` pixels away from its place.
    """
    backgrounds, colours, radii, centres = _tables(code.device)
    things = code[:, 1:].reshape(-1, 4)
    shape, colour, size, place = things.clamp(min=0).unbind(1)
    centre = centres[place]
    if generator is not None:
        away = torch.rand(centre.shape, generator=generator, dtype=torch.float32, device=code.device)
        centre = centre + JITTER * (2 * away - 1)
    cover = coverage(shape, radii[size], centre) * (things[:, 0] >= 0)[:, None, None]
    pictures = paint(
        backgrounds[code[:, 0]], colours[colour].view(len(code), -1, 3), cover.unflatten(0, (len(code), -1))
    )
    return 2 * pictures - 1


@functools.cache  # on a GPU each copy would wait for whatever it is doing
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Colours of backgrounds and things, radii and centres, by index."""
    tables = (BACKGROUNDS, COLOURS, SIZES, PLACES)
    return tuple(torch.tensor([*names.values()], dtype=torch.float32, device=device) for names in tables)


def draw(scene: Scene, generator: torch.Generator | None = None) -> torch.Tensor:
    """The picture of a scene, float32 [3, 64, 64] in [-1, 1]; see ``draw_codes``."""
    return draw_codes(codes([scene]), generator)[0]
