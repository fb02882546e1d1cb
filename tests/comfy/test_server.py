"""The node in a real ComfyUI, on small random models: its pictures compared with those drawn without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from onlinequant_backend.report import STATS_FILE, Report

if TYPE_CHECKING:
    from tests.comfy.conftest import Server

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(1800)]

STEPS, SIZE = 3, 128
# PSNR in dB. Random weights, in the decoder as well, exaggerate every difference: 8 bit gives 26 to 30, even with seven
# bits of weights, and a LoRA of another strength 12 to 18.
CLOSE, SAME = 23.0, 60.0
Picture = np.ndarray[Any, np.dtype[np.float64]]


def workflow(model: str, seed: int, quantized: bool, lora: float | None = None) -> dict[str, Any]:
    """A text-to-image workflow in API format; ``lora`` is the strength of one."""
    nodes: dict[str, Any] = {}

    def add(name: str, **inputs: Any) -> list[Any]:
        nodes[name] = {"class_type": name.partition("#")[0], "inputs": inputs}
        return [name, 0]

    checkpoint = add("CheckpointLoaderSimple", ckpt_name=f"tiny_{model}.safetensors")
    denoiser, clip, vae = ([checkpoint[0], output] for output in range(3))
    if lora is not None:
        denoiser = add(
            "LoraLoaderModelOnly",
            model=denoiser,
            lora_name=f"tiny_{model}_lora.safetensors",
            strength_model=lora,
        )
    if quantized:
        # As by default, but for what a test's sizes and any CPU need: no threshold, and 8 bit whatever the device.
        denoiser = add(
            "OnlineQuantModel",
            model=denoiser,
            quantized_conv_percentage=100,
            quantized_linear_percentage=100,
            conv_compute_density_threshold=0,
            linear_compute_density_threshold=0,
            precision="int8",
            calibration_steps=0,
        )
    sampled = add(
        "KSampler",
        model=denoiser,
        positive=add("CLIPTextEncode#positive", clip=clip, text="a photo of a cat"),
        negative=add("CLIPTextEncode#negative", clip=clip, text="blurry"),
        latent_image=add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        seed=seed,
        steps=STEPS,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=0.5,
    )
    add("SaveImage", images=add("VAEDecode", samples=sampled, vae=vae), filename_prefix="test")
    return nodes


def psnr(picture: Picture, expected: Picture) -> float:
    """In dB."""
    return float(10 * np.log10(255**2 / max(np.mean((picture - expected) ** 2), 1e-12)))


def entries(server: Server) -> set[Path]:
    """What was saved, in the folder that ComfyUI keeps from its users."""
    return set(server.base.glob("user/__onlinequant/entries/*"))


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_first_picture_is_observed_and_all_others_are_in_8_bit_and_close(server: Server, model: str) -> None:
    seeds_and_loras = [(1, None), (2, None), (1, 1.0), (1, 0.5)]
    expected = {case: server.draw(workflow(model, case[0], False, case[1])) for case in seeds_and_loras}
    saved, compiled = entries(server), len(server.lines("quantized:"))

    observed = server.draw(workflow(model, 1, True))
    assert psnr(observed, expected[1, None]) > SAME
    assert entries(server) == saved and not server.lines("quantized:")[compiled:]

    # The second prompt compiles. Those after it do not, whatever their seed and whatever the strength of a LoRA.
    for seed, lora in [(2, None), (1, None), (1, 1.0), (1, 0.5)]:
        picture = server.draw(workflow(model, seed, True, lora))
        close = {case: psnr(picture, other) for case, other in expected.items()}
        own = close.pop((seed, lora))
        assert CLOSE < own < SAME, (seed, lora)
        assert own > max(close.values()) + 2, (seed, lora)
        assert len(server.lines("quantized:")) == compiled + 1
    (entry,) = entries(server) - saved
    report = Report.load(entry / STATS_FILE)
    assert (report.phase, report.calls_observed) == ("quantized", STEPS)
    assert all(decision.quantized for decision in report.decisions)
