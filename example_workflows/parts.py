"""What the example workflows have in common: their notes, and the nodes from a model to a saved picture."""

from __future__ import annotations

from example_workflows.workflow import PREVIEW, PROGRESS, Link, Look, Node, Value, Workflow

PICTURE = "example.png"  # lies in the input folder of every ComfyUI

# What both OnlineQuant nodes that patch a model have in common: their defaults.
DEFAULTS: dict[str, Value] = {
    "preset": "fast",
    "quantized_conv_percentage": 100,
    "quantized_linear_percentage": 100,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 0,
    "precision": "auto",
    "calibration_steps": 0,
    "selection": "auto",
    "exclude": "",
    "cuda_graphs": "auto",
    "compile_in_background": True,
}

# The widget that came last.
PERCENTAGE: dict[str, Value] = {"quantized_attention_percentage": 100}

SEED = 1
PROMPT = "a lighthouse on a cliff at dawn, detailed oil painting, warm light"
UNWANTED = "blurry, low quality, watermark"

HOW_IT_GOES = """\
**First run.** Drawn in float, exactly as without the node, while the ranges of the activations are observed. At its
end the model is compiled, once: about a minute on a GPU, minutes on a CPU. The node shows how far it is.

**From the second run on** it is in 8 bit, and so is the first run after a restart, since everything is saved. The seed
goes up by one each time, so just press Run again.

**Nothing is observed or compiled again** for another prompt, seed, LoRA or strength. A second size compiles one more
graph, which then serves all sizes.
"""


def notes(variant: str) -> str:
    """What to expect."""
    if variant == "quantized":
        return HOW_IT_GOES
    if variant == "compiled":
        return """\
ComfyUI's own compile node, with Inductor: the picture and the time to compare with. The first run compiles, after every
restart. The seed goes up by one each time, so press Run twice and look at the second time.
"""
    return """\
Nothing is compiled: the picture and the time to compare with. The seed goes up by one each time, and the compiled and
the quantized workflow begin with the same one.
"""


def accelerated(workflow: Workflow, variant: str, model: Link) -> Link:
    """The model as it is ("baseline"), with ComfyUI's own node ("compiled") or with ours ("quantized")."""
    if variant == "compiled":
        return workflow.add("Model", "TorchCompileModel", model=model, backend="inductor")[0]
    if variant == "quantized":
        return workflow.add(
            "Model", "OnlineQuantModel", PROGRESS, model=model, **DEFAULTS, observe_again=0, **PERCENTAGE
        )[0]
    return model


def prompts(workflow: Workflow, clip: Link) -> tuple[Node, Node]:
    """What to draw, and what not."""
    positive = workflow.add("Prompt", "CLIPTextEncode", Look("What to draw"), clip=clip, text=PROMPT)
    negative = workflow.add("Prompt", "CLIPTextEncode", Look("What not to draw"), clip=clip, text=UNWANTED)
    return positive, negative


def sampled(
    workflow: Workflow,
    group: str,
    model: Link,
    positive: Link,
    negative: Link,
    latent: Link,
    *,
    cfg: float = 8.0,
    scheduler: str = "normal",
    seed: int | Link = SEED,
) -> Link:
    """20 steps of Euler, as the predecessor's workflows had."""
    sampler = workflow.add(
        group,
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=seed,
        steps=20,
        cfg=cfg,
        sampler_name="euler",
        scheduler=scheduler,
        denoise=1.0,
    )
    return sampler[0]


def saved(workflow: Workflow, group: str, latent: Link, vae: Link, name: str) -> Link:
    """The decoded picture, which is also saved."""
    picture = workflow.add(group, "VAEDecode", samples=latent, vae=vae)
    workflow.add(group, "SaveImage", PREVIEW, images=picture, filename_prefix=f"onlinequant/{name}")
    return picture[0]


def report(workflow: Workflow, model: Link, picture: Link, **reference: Link) -> None:
    """What became of each layer, as a chart and as a table; it waits for ``picture``."""
    made = workflow.add(
        "Report", "OnlineQuantReport", Look(room=560, width=900), model=model, picture=picture, **reference
    )
    workflow.add("Report", "PreviewAny", Look("Every layer and why", room=320), source=made)
