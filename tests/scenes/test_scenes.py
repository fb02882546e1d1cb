from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.train_scenes import SCHEDULER, save
from onlinequant_backend.runtime import current_run
from onlinequant_backend.scenes import judge
from onlinequant_backend.scenes.drawing import DISTANCES, coverage
from onlinequant_backend.scenes.features import features, frechet_distance
from onlinequant_backend.scenes.model import WEIGHTS, ScenesModel, load
from onlinequant_backend.scenes.sampling import SAMPLERS, make_scheduler, sample
from onlinequant_backend.scenes.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    captions,
    codes,
    draw,
    draw_codes,
    every_scene,
    is_held_out,
    parse,
)
from onlinequant_backend.scenes.sheet import save_sheet

RING = Thing("ring", "red", "large", "top left")
CROSS = Thing("cross", "blue", "small", "bottom right")
SCENE = Scene("grey", (RING, CROSS))
TEXT = "a grey background with a large red ring at the top left and a small blue cross at the bottom right"


def drawn(texts: list[str], seed: int = 0) -> torch.Tensor:
    """True pictures, with things a little away from their places."""
    return draw_codes(codes([parse(text) for text in texts]), torch.Generator().manual_seed(seed))


def tiny_model() -> ScenesModel:
    """The smallest UNet with every kind of block, random weights, in the trained model's scheduler."""
    torch.manual_seed(0)
    unet = {
        "sample_size": 16,
        "in_channels": 50,
        "out_channels": 48,
        "block_out_channels": [32, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    config = {"unet": unet, "text_width": 16, "scheduler": SCHEDULER}
    return ScenesModel(config).eval().requires_grad_(False)


class TestScene:
    def test_a_caption_says_everything(self) -> None:
        assert caption(SCENE) == TEXT and parse(TEXT) == SCENE
        assert all(caption(parse(text)) == text for text in captions(50, seed=0))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a ring",
            TEXT.replace("red", "pink"),
            TEXT.replace("grey", "red"),
            TEXT + " and",
            TEXT.replace("top", "far"),
        ],
    )
    def test_what_is_no_caption_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a caption such as"):
            parse(text)

    def test_every_scene_comes_once(self) -> None:
        scenes = list(every_scene())
        assert len(scenes) == len(set(scenes)) == 720 + 129_600

    def test_captions_depend_on_the_seed_alone(self) -> None:
        assert captions(20, seed=3) == captions(30, seed=3)[:20] != captions(20, seed=4)
        assert Counter(len(parse(text).things) for text in captions(300, seed=0))[2] == pytest.approx(200, abs=30)

    def test_held_out_captions_are_a_split(self) -> None:
        assert all(is_held_out(text) for text in captions(50, seed=0, held_out=True))
        assert not any(is_held_out(text) for text in captions(50, seed=0, held_out=False))
        assert 0.1 < sum(map(is_held_out, captions(500, seed=0))) / 500 < 0.4

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("colour", COLOURS)
    def test_every_shape_of_every_colour_is_seen_at_most_places(self, shape: str, colour: str) -> None:
        texts = (caption(Scene("grey", (Thing(shape, colour, "small", place),))) for place in PLACES)
        assert sum(map(is_held_out, texts)) <= 1


class TestDrawing:
    def test_colours_are_those_of_the_palette(self) -> None:
        picture = (draw(SCENE) + 1) / 2
        assert picture.shape == (3, 64, 64) and picture.dtype == torch.float32
        assert picture[:, 0, 0].tolist() == pytest.approx(BACKGROUNDS["grey"], abs=1e-6)
        assert picture[:, 16, 16].tolist() == pytest.approx(BACKGROUNDS["grey"], abs=1e-6), "a ring has a hole"
        assert picture[:, 16, 7].tolist() == pytest.approx(COLOURS["red"], abs=1e-6)
        assert picture[:, 48, 48].tolist() == pytest.approx(COLOURS["blue"], abs=1e-6)

    def test_areas_are_those_of_the_shapes(self) -> None:
        radius = 20.0
        areas = {
            "circle": torch.pi,
            "square": 1.8**2,
            "triangle": 1.8,
            "cross": 4 * 0.6 - 0.36,
            "ring": torch.pi * 3 / 4,
        }
        cover = coverage(torch.arange(len(DISTANCES)), torch.full((5,), radius), torch.full((5, 2), 32.3))
        for shape, covered in zip(DISTANCES, cover.sum((1, 2)), strict=True):
            assert covered.item() == pytest.approx(areas[shape] * radius**2, rel=0.01), shape
        assert ((cover > 0) & (cover < 1)).any(), "edges are smooth"

    def test_a_generator_moves_things_a_little(self) -> None:
        first, second = (drawn([TEXT], seed) for seed in (0, 1))
        assert not torch.equal(first, second) and not torch.equal(first[0], draw(SCENE))
        assert judge.matches(first[0], TEXT) and judge.matches(second[0], TEXT)


class TestJudge:
    def test_true_drawings_are_right_under_mild_noise(self) -> None:
        texts = captions(400, seed=0)
        noise = torch.randn(400, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert judge.score(drawn(texts) + 0.05 * noise, texts) >= 0.995

    @pytest.mark.parametrize(
        "change",
        [{"shape": other} for other in SHAPES if other != RING.shape]
        + [{"colour": other} for other in COLOURS if other != RING.colour]
        + [{"size": other} for other in SIZES if other != RING.size]
        + [{"place": other} for other in ("top right", "bottom left")],
    )
    def test_another_thing_is_wrong(self, change: dict[str, str]) -> None:
        other = Scene(SCENE.background, (dataclasses.replace(RING, **change), CROSS))
        assert not judge.matches(draw(SCENE), caption(other)) and not judge.matches(draw(other), TEXT)

    @pytest.mark.parametrize("background", [other for other in BACKGROUNDS if other != SCENE.background])
    def test_another_background_is_wrong(self, background: str) -> None:
        assert not judge.matches(draw(SCENE), caption(Scene(background, SCENE.things)))

    def test_one_thing_more_or_less_is_wrong(self) -> None:
        one = Scene("grey", (RING,))
        assert not judge.matches(draw(SCENE), caption(one)) and not judge.matches(draw(one), TEXT)

    def test_the_order_in_a_caption_does_not_matter(self) -> None:
        assert judge.matches(draw(SCENE), caption(Scene("grey", (CROSS, RING))))

    def test_what_is_no_scene_is_unreadable(self) -> None:
        strange = draw(SCENE)
        strange[:, 40:60, 4:28] = torch.linspace(-1, 1, 24)  # a shade where nothing should be
        assert not judge.matches(strange, TEXT)
        assert not judge.matches(torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)), TEXT)

    def test_a_score_is_the_share_that_is_right(self) -> None:
        texts = captions(8, seed=1)
        assert judge.score(drawn(texts), [*texts[:6], texts[0], texts[1]]) == 0.75
        with pytest.raises(ValueError, match="8 pictures and 7 captions"):
            judge.score(drawn(texts), texts[:7])


class TestModel:
    def test_latents_hold_all_of_a_picture(self) -> None:
        pictures = drawn([TEXT])
        latents = ScenesModel.to_latents(pictures)
        assert latents.shape == (1, 48, 16, 16)
        assert torch.equal(ScenesModel.decode(latents), pictures)
        assert ScenesModel.decode(3 * latents).abs().max() == 1

    def test_latents_are_told_where_they_are(self) -> None:
        latents = torch.zeros(2, 48, 16, 16)
        placed = ScenesModel.placed(latents)
        assert placed.shape == (2, 50, 16, 16) and torch.equal(placed[:, :48], latents)
        assert placed[1, 48:, 0, 15].tolist() == [1, -1], "right, down"

    def test_text_states_tell_captions_apart(self) -> None:
        states = tiny_model().encode([TEXT, caption(Scene("grey", (CROSS, RING))), ""])
        assert states.shape[0] == 3 and states.isfinite().all()
        assert not torch.allclose(states[0], states[1]) and not torch.allclose(states[0], states[2])

    def test_unknown_words_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no word 'pink'"):
            tiny_model().encode(["a pink ring"])

    def test_what_was_saved_is_loaded_in_any_dtype(self, tmp_path: Path) -> None:
        model = tiny_model()
        save(model, [], tmp_path)
        loaded = load(path=tmp_path / WEIGHTS.name)
        assert loaded.config == model.config
        assert torch.allclose(loaded.encode([TEXT]), model.encode([TEXT]), atol=1e-2)  # kept in float16
        model = load(dtype=torch.bfloat16, path=tmp_path / WEIGHTS.name)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.encode([TEXT]).dtype == torch.bfloat16

    def test_before_training_it_says_how_to_train(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"train_scenes\.py"):
            load(path=tmp_path / WEIGHTS.name)


class TestSampling:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_a_denoiser_that_knows_the_picture_draws_it(self, sampler: str) -> None:
        model, picture = tiny_model(), draw(SCENE)

        def denoise(latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
            return (model.to_latents(picture[None]).expand(len(latents), -1, -1, -1),)

        shown = sample(denoise, model, [TEXT], 0, sampler=sampler, steps=4, batch=1)
        assert torch.allclose(shown[0], picture, atol=1e-4)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_the_first_step_sees_noise_alone(self, sampler: str) -> None:
        scheduler = make_scheduler(sampler, tiny_model())
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] < 1e-6

    def test_a_solver_of_second_order_does_not_follow_predictions_out_of_range(self) -> None:
        model, seen = tiny_model(), []

        def denoise(latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
            seen.append(float(latents[:, :48].mean()))
            return (torch.full_like(latents[:, :48], 3.0),)

        sample(denoise, model, [TEXT], 0, sampler="dpm++2m", steps=10, batch=1)
        assert seen[-1] < 1.1

    def test_pictures_do_not_depend_on_the_batch(self) -> None:
        model, texts = tiny_model(), captions(3, seed=0)
        whole, single, filled = (sample(model.unet, model, texts, 5, steps=3, batch=batch) for batch in (3, 1, 2))
        assert torch.allclose(whole, single, atol=1e-4) and torch.allclose(whole, filled, atol=1e-4)
        assert not torch.allclose(whole, sample(model.unet, model, texts, 6, steps=3, batch=3), atol=1e-2)

    def test_all_calls_are_alike_and_observed_only_if_asked(self) -> None:
        model = tiny_model()
        calls = []

        def denoise(latents: torch.Tensor, time: torch.Tensor, texts: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
            calls.append((latents.shape, time.shape, time.dtype, texts.shape, current_run() is not None))
            return (latents[:, :48],)

        for observe in (False, True):
            calls.clear()
            shown = sample(denoise, model, captions(3, seed=0), 0, steps=2, batch=2, observe=observe)
            assert shown.shape == (3, 3, 64, 64) and len(calls) == 4
            assert set(calls) == {((4, 50, 16, 16), (4,), torch.float32, (4, 24, 16), observe)}

    def test_the_shipped_model_draws_what_it_was_not_trained_on(self) -> None:
        model, texts = load(), captions(16, seed=3, held_out=True)
        pictures = sample(model.unet, model, texts, seed=3, steps=12, batch=16)
        right = judge.correct(pictures, texts)
        assert right.float().mean() >= 0.75
        assert not judge.correct(pictures, texts[1:] + texts[:1])[right].any()

    def test_an_unknown_sampler_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"no sampler 'heun': choose one of euler"):
            sample(tiny_model().unet, tiny_model(), [TEXT], 0, sampler="heun")


class TestFeatures:
    def test_a_distance_of_known_gaussians(self) -> None:
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double()
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(x, x + 3) == pytest.approx(4 * 9)
        around = x - x.mean(0)  # of deviations s and 2 s: s^2 + 4 s^2 - 2 * 2 s^2
        assert frechet_distance(around, 2 * around) == pytest.approx(x.T.cov().trace().item())
        with pytest.raises(ValueError, match="at least two"):
            frechet_distance(x[:1], x)

    def test_worse_pictures_are_farther_away(self) -> None:
        texts = captions(256, seed=0)
        true, others = features(drawn(texts)), features(drawn(captions(256, seed=1)))
        noise = torch.randn(256, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert true.shape == (256, 32)
        assert frechet_distance(true, others) < 0.5 * frechet_distance(true, features(drawn(texts) + 0.5 * noise))


def test_a_sheet_has_every_caption(tmp_path: Path) -> None:
    texts = captions(5, seed=0)
    save_sheet(tmp_path / "one.png", {"float": drawn(texts)}, texts, columns=5)
    save_sheet(tmp_path / "two.png", {"float": drawn(texts)}, texts, columns=3)
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.height == 2 * one.height and two.width < one.width
