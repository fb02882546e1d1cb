"""The nodes in a real ComfyUI, on small random models: its pictures compared with those drawn without them.

Whatever a workflow changes, its picture must be close to the one that the same workflow draws in float, and closer to
it than to the float pictures of all others: a stale weight, graph or picture would show.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.comfy.server import running_server
from tests.comfy.workflow import (
    COMPILE,
    DIT,
    OPTIONS,
    OTHER_DIT,
    QUANTIZE,
    SMALL_UNET,
    Drawing,
    Patch,
    Video,
    Workflow,
    lora,
    patch,
)

if TYPE_CHECKING:
    from tests.comfy.server import Picture, Server

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(1800)]

# PSNR in dB. Random weights, in the decoder as well, exaggerate every difference: 8 bit gives 26 to 30, even with seven
# bits of weights, and a LoRA of another strength 12 to 18. What was drawn in float is equal but for rounding.
CLOSE, EXACT = 23.0, 60.0
# By how much a picture is nearer to its own float picture than to any other one.
NEARER = 2.0


@dataclasses.dataclass(frozen=True)
class Shot:
    """A picture, or several, that a workflow drew.

    Attributes:
        psnr: to the picture that the same workflow draws in float, in dB.
        nearest_other: the same for the float picture of another workflow that it is nearest to.
        compiled: how many graphs were compiled meanwhile.
        traced: how often Dynamo traced something anew that it had traced.
    """

    psnr: float
    nearest_other: float
    compiled: int
    traced: int
    texts: list[str]

    @property
    def is_exact(self) -> bool:
        return self.psnr > EXACT

    @property
    def is_8_bit(self) -> bool:
        return CLOSE < self.psnr < EXACT

    @property
    def is_quick(self) -> bool:
        """Nothing was compiled, and nothing traced again."""
        return self.compiled == self.traced == 0


class Studio:
    """Draws workflows, compares what they draw with what they draw in float, and remembers the latter."""

    def __init__(self, server: Server, floats: dict[Drawing | Video, Picture]) -> None:
        self.server = server
        self.floats = floats

    def in_float(self, drawing: Drawing | Video) -> Picture:
        """What it draws without our nodes."""
        plain = drawing.in_float()
        if plain not in self.floats:
            self.floats[plain] = np.stack(self.server.run(plain.workflow()).pictures)
        return self.floats[plain]

    def draw(self, drawing: Drawing | Video, report: bool = False) -> Shot:
        """Draw it as it is. It must be nearer to its own float picture than to all others of its size."""
        own = self.in_float(drawing)
        before = self._counts()
        result = self.server.run(drawing.workflow(report))
        compiled, traced, failed = (int(count) for count in np.subtract(self._counts(), before))
        assert not failed, (drawing, self.server.log.read_text().rpartition("onlinequant failed")[2][:9000])
        picture = np.stack(result.pictures)
        others = [other for other in self.floats.values() if other.shape == own.shape and psnr(other, own) < EXACT]
        nearest_other = max((psnr(picture, other) for other in others), default=0.0)
        shot = Shot(psnr(picture, own), nearest_other, compiled, traced, result.texts)
        assert shot.psnr > nearest_other + NEARER, (drawing, shot)
        return shot

    def prepare(self, drawing: Drawing | Video) -> None:
        """Draw it once, in float or in 8 bit, so that the next time everything is there."""
        assert self.draw(drawing).psnr > CLOSE

    def _counts(self) -> list[int]:
        return [len(self.server.lines(text)) for text in ("quantized:", "Recompiling function", "onlinequant failed")]


@pytest.fixture(scope="module")
def studio(server: Server) -> Studio:
    return Studio(server, {})


def psnr(picture: Picture, expected: Picture) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / max(np.mean((picture - expected) ** 2), 1e-12)))


SMALL = Drawing(unet=SMALL_UNET)
PLAIN = SMALL.quantized()
TRANSFORMER = Drawing(DIT)


def entries(server: Server) -> set[Path]:
    """What was saved, in the folder that ComfyUI keeps from its users."""
    return set(server.base.glob("user/__onlinequant/entries/*"))


@pytest.mark.parametrize("drawing", [Video(), Drawing("sdxl"), Drawing()], ids=["svd", "sdxl", "sd15"])
def test_the_first_picture_is_observed_and_all_others_are_in_8_bit_and_close(
    studio: Studio, drawing: Drawing | Video
) -> None:
    saved = entries(studio.server)
    first = studio.draw(drawing.quantized())
    assert first.is_exact and first.compiled == 1
    assert len(entries(studio.server) - saved) == 1

    second = studio.draw(drawing.quantized().but(seed=2), report=True)
    assert second.is_8_bit and second.is_quick
    (report,) = second.texts
    assert "quantized: 8-bit layers" in report, report
    layers = [tuple(map(int, found)) for found in re.findall(r"([1-9]\d*) of (\d+) (?:conv|linear)", report)]
    # The time embedding's layers do less than one operation a byte.
    spared = re.findall(r"^ +(\d+)  .*(?:would cause most of the image's error|is below \w+=1)$", report, re.MULTILINE)
    assert len(layers) == 2, report
    assert sum(candidates - quantized for quantized, candidates in layers) == sum(map(int, spared)), report


def test_a_lora_comes_changes_its_strength_and_goes_and_nothing_is_compiled(studio: Studio) -> None:
    studio.prepare(PLAIN)
    for patches in [(lora(1.0),), (lora(0.5),), (), (lora(1.0),)]:
        shot = studio.draw(SMALL.but(patches=patches).quantized())
        assert shot.is_8_bit and shot.is_quick, patches


def test_what_is_unloaded_comes_back_and_nothing_is_compiled(studio: Studio) -> None:
    drawing = SMALL.but(patches=(lora(1.0),)).quantized()
    studio.prepare(PLAIN)
    studio.prepare(drawing)
    before = len(studio.server.log.read_text())
    studio.server.post("/free", {"unload_models": True})
    studio.server.wait_for("unloaded with the model: .* of 8-bit copies", since=before)
    for again in (drawing, PLAIN):
        shot = studio.draw(again.but(seed=2))
        assert shot.is_8_bit and shot.is_quick, again


@pytest.mark.parametrize("quantized", [False, True], ids=["in float", "in 8 bit"])
def test_a_control_net_stops_before_the_last_step(studio: Studio, quantized: bool) -> None:
    controlled = PLAIN.but(control_end=0.7, control_quantized=quantized)
    studio.prepare(PLAIN)
    studio.prepare(controlled)
    assert bool(studio.server.lines("ControlNet: quantized:")) == quantized
    for drawing in (controlled, PLAIN, controlled.but(control_end=0.9, seed=2)):
        shot = studio.draw(drawing)
        assert shot.is_8_bit and shot.is_quick, drawing


def test_a_second_size_is_one_more_graph_and_that_serves_all_others(studio: Studio) -> None:
    studio.prepare(PLAIN)
    second = studio.draw(PLAIN.but(size=(192, 128)))
    assert second.is_8_bit and second.compiled <= 1  # none where another test has had it compiled
    long = "blurry, " * 60  # more than the 77 tokens of a chunk
    for changes in ({"size": (64, 128)}, {"batch": 2}, {"cfg": 1.0}, {"negative": long}):
        shot = studio.draw(PLAIN.but(**changes))
        assert shot.is_8_bit and shot.is_quick, changes


def test_a_patched_block_is_a_graph_of_its_own(studio: Studio) -> None:
    studio.prepare(PLAIN)
    patched = SMALL.but(patches=(patch("ScaleOutputBlocks", by=0.8),)).quantized()
    studio.prepare(patched)
    for drawing in (patched.but(seed=2), PLAIN, patched):
        shot = studio.draw(drawing)
        assert shot.is_8_bit and shot.is_quick, drawing


def test_easy_cache_skips_steps_as_before(studio: Studio) -> None:
    studio.prepare(PLAIN)
    skipping = patch("EasyCache", reuse_threshold=0.5, start_percent=0.0, end_percent=1.0, verbose=False)
    skipped = SMALL.but(patches=(skipping,), steps=6).quantized()
    studio.prepare(skipped)
    shot = studio.draw(skipped.but(seed=2))
    assert shot.is_8_bit and shot.is_quick


def test_hyper_tile_splits_the_graph_and_leaves_the_picture_alone(studio: Studio) -> None:
    tiled = SMALL.but(patches=(patch("HyperTile", tile_size=64, swap_size=2, max_depth=0, scale_depth=False),))
    studio.prepare(tiled.quantized())
    shot = studio.draw(tiled.quantized().but(seed=2))
    assert shot.is_8_bit and shot.is_quick


@pytest.mark.parametrize("before", [QUANTIZE, COMPILE], ids=["itself", "TorchCompileModel"])
def test_behind_another_node_that_compiles_ours_counts(studio: Studio, before: Patch) -> None:
    studio.prepare(PLAIN)
    shot = studio.draw(PLAIN.but(patches=(before, QUANTIZE)))
    assert shot.is_8_bit and shot.is_quick


def test_torch_compile_model_behind_our_node_takes_its_place(studio: Studio) -> None:
    studio.prepare(TRANSFORMER.quantized())
    replaced = studio.draw(TRANSFORMER.but(patches=(QUANTIZE, COMPILE)))
    assert replaced.is_exact and not replaced.compiled
    assert studio.draw(TRANSFORMER.quantized()).is_8_bit


def test_without_our_node_the_model_is_as_before(studio: Studio) -> None:
    studio.prepare(PLAIN)
    absent = studio.draw(PLAIN.in_float())
    assert absent.is_exact and absent.is_quick


def test_a_model_that_was_unloaded_goes_on_in_8_bit(studio: Studio) -> None:
    studio.prepare(PLAIN)
    studio.server.post("/free", {"unload_models": True, "free_memory": True})
    shot = studio.draw(PLAIN)
    assert shot.is_8_bit and not shot.compiled


def test_several_models_in_one_workflow_do_not_disturb_each_other(studio: Studio) -> None:
    drawings = [PLAIN, SMALL.but(patches=(lora(1.0),)).quantized(), TRANSFORMER.quantized()]
    expected = [studio.in_float(drawing) for drawing in drawings]
    # The first time, ComfyUI loads again what it has dropped meanwhile; a model that is new and has a LoRA is observed.
    for worst in (np.inf, EXACT):
        flow = Workflow()
        for drawing in drawings:
            drawing.add_to(flow)
        pictures = studio.server.run(flow.nodes).pictures
        assert len(pictures) == len(drawings)
        # ComfyUI draws them in an order of its own.
        distances = [max(psnr(picture, own[0]) for picture in pictures) for own in expected]
        assert all(CLOSE < distance < worst for distance in distances), distances


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "default"])
def test_weights_in_few_bits_are_quantized_as_well(studio: Studio, dtype: str) -> None:
    drawing = SMALL.but(weights=dtype).quantized()
    studio.prepare(drawing)
    shot = studio.draw(drawing.but(seed=2))
    assert shot.is_8_bit and shot.is_quick


def test_a_transformer_is_quantized_like_any_other_model(studio: Studio) -> None:
    studio.prepare(TRANSFORMER.quantized())
    shot = studio.draw(TRANSFORMER.quantized().but(seed=2))
    assert shot.is_8_bit and shot.is_quick


def test_a_prompt_can_be_interrupted_while_it_observes_and_while_it_compiles(studio: Studio) -> None:
    # Of no other test, so that it is observed and compiled here.
    drawing = Drawing(OTHER_DIT, patches=(patch(QUANTIZE.kind, **OPTIONS, exclude="final_layer.linear"),))
    studio.in_float(drawing)
    compiled = len(studio.server.lines("quantized:"))

    # The bar is not drawn at every step.
    interrupt(studio.server, drawing.but(steps=500), r"\| [1-9]\d*/500 \[")
    assert len(studio.server.lines("quantized:")) == compiled
    interrupt(studio.server, drawing, rf"\| {drawing.steps}/{drawing.steps} \[")
    assert len(studio.server.lines("quantized:")) == compiled + 1

    shot = studio.draw(drawing)
    assert shot.is_8_bit and shot.is_quick


def test_sampling_does_not_wait_for_a_compile_in_the_background(studio: Studio) -> None:
    # Compiled by no other test; in the background is what the node does by default.
    options = {name: value for name, value in OPTIONS.items() if name != "compile_in_background"}
    drawing = Drawing(OTHER_DIT, patches=(patch(QUANTIZE.kind, **options, exclude="final_layer.linear, *.qkv"),))
    compiled, before = len(studio.server.lines("quantized:")), len(studio.server.log.read_text())
    # In float, exactly, unless another test has had these weights observed: then it may change over in the middle.
    studio.prepare(drawing)
    studio.server.wait_for("quantized:", before)
    assert len(studio.server.lines("quantized:")) == compiled + 1
    shot = studio.draw(drawing.but(seed=2))
    assert shot.is_8_bit and shot.is_quick


def interrupt(server: Server, drawing: Drawing, when: str) -> None:
    """Interrupt a prompt when its log says so."""
    before = len(server.log.read_text())
    prompt = server.submit(drawing.workflow())
    server.wait_for(when, before)
    server.post("/interrupt", {})
    assert server.result(prompt).status == "interrupted"


def test_a_new_server_starts_from_the_cache_that_the_environment_names(studio: Studio, tmp_path: Path) -> None:
    # Two servers of its own: what the others' has in its cache depends on what it has drawn before.
    cache, floats = tmp_path / "cache", studio.floats
    studio.in_float(PLAIN)
    saved = set()
    for number in (1, 2):
        base = tmp_path / f"base{number}"
        base.mkdir()
        with running_server(base, {"COMFYUI_ONEDIFF_SAVE_GRAPH_DIR": str(cache)}) as server:
            shot = Studio(server, floats).draw(PLAIN, report=True)
            assert not entries(server)
        if number == 1:
            assert shot.is_exact
            saved = set(cache.glob("entries/*"))
            assert len(saved) == 1
        else:
            assert shot.is_8_bit and "decisions from the cache" in shot.texts[0]
            assert set(cache.glob("entries/*")) == saved


def test_a_lora_that_leaves_the_weights_alone_is_a_graph_of_its_own(studio: Studio) -> None:
    studio.prepare(PLAIN)
    for strength in (1.0, 0.5):
        assert studio.draw(SMALL.but(patches=(bypass(strength),)).quantized()).is_8_bit
    again = studio.draw(SMALL.but(patches=(bypass(0.5),), seed=2).quantized())
    assert again.is_8_bit and again.is_quick
    assert studio.draw(PLAIN).is_8_bit


def bypass(strength: float) -> Patch:
    return lora(strength, "LoraLoaderBypassModelOnly")
