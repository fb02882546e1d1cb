"""Draw with Stable Diffusion 1.5 through onlinequant: the second picture is drawn in 8 bit.

    python examples/diffusers_sd15.py --prompt "a lighthouse at dusk"

Needs diffusers, transformers and the model's weights, which diffusers downloads.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import StableDiffusionPipeline

import onlinequant_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--prompt", default="a lighthouse at dusk, oil painting")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(options.model)
    pipeline.unet = pipeline.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    pipeline.unet = torch.compile(
        pipeline.unet,
        backend="onlinequant",
        options={"calibration_steps": options.steps},  # one whole sampling run is observed
    )
    for name in ("float.png", "8-bit.png"):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        picture = pipeline(options.prompt, num_inference_steps=options.steps, generator=generator).images[0]
        picture.save(name)
        print(f"{name}: {time.perf_counter() - start:.1f} s, {onlinequant_backend.reports()[-1].phase}")
    print(onlinequant_backend.reports()[-1].table())


if __name__ == "__main__":
    main()
