"""Draw two pictures with Stable Diffusion 1.5 through onlinequant, and print the report after each.

    python examples/diffusers_sd15.py --prompt "a lighthouse at dusk"

The first picture is drawn in float while the model is observed, and the second with 8-bit layers. If an earlier run has
left an entry in the cache, both are drawn with 8-bit layers. Needs diffusers, transformers and the model's weights,
which diffusers downloads.
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
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype).to(device)
    pipeline.unet = pipeline.unet.to(memory_format=torch.channels_last).requires_grad_(False)
    pipeline.unet = torch.compile(pipeline.unet, backend="onlinequant")
    for name in ("first.png", "second.png"):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        # The whole run is observed, however many calls the sampler makes for its steps.
        with onlinequant_backend.sampling_run(options.steps):
            result = pipeline(options.prompt, num_inference_steps=options.steps, generator=generator)
        result.images[0].save(name)
        report = onlinequant_backend.reports()[-1]
        source = "from the cache" if report.cache_hit else f"{report.calls_observed} calls observed"
        print(f"{name}: {time.perf_counter() - start:.1f} s. After it: {report.summary()}; {source}")
    print(onlinequant_backend.reports()[-1].table())


if __name__ == "__main__":
    main()
