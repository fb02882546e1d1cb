"""The example workflows."""

from __future__ import annotations

from example_workflows.parts import (
    DEFAULTS,
    HOW_IT_GOES,
    PERCENTAGE,
    PICTURE,
    SEED,
    accelerated,
    notes,
    prompts,
    report,
    sampled,
    saved,
)
from example_workflows.workflow import PREVIEW, PROGRESS, Look, Workflow

# In the order in which they should be tried.
VARIANTS = {"baseline": "1 in float", "compiled": "2 TorchCompileModel", "quantized": "3 OnlineQuant"}


def text_to_image(name: str, variant: str, checkpoint: str, size: int) -> Workflow:
    """From a prompt to a picture, with nothing else; ``variant``: see ``accelerated``."""
    workflow = Workflow(f"{name} {VARIANTS[variant]}", f"{name}, {size} x {size}.\n\n{notes(variant)}")
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name=checkpoint)
    model = accelerated(workflow, variant, loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=size, height=size, batch_size=1)
    latent = sampled(workflow, "Picture", model, positive[0], negative[0], empty[0])
    saved(workflow, "Picture", latent, loader[2], f"{name.lower()}_{variant}")
    return workflow


def reported() -> Workflow:
    """SDXL in 8 bit with what became of each layer."""
    workflow = Workflow("SDXL 4 report", f"Which layers are in 8 bit, why the rest is not, how fast.\n\n{HOW_IT_GOES}")
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    model = accelerated(workflow, "quantized", loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    latent = sampled(workflow, "Picture", model, positive[0], negative[0], empty[0])
    saved(workflow, "Picture", latent, loader[2], "sdxl_report")
    report(workflow, model, latent)
    return workflow


def image_to_video(variant: str) -> Workflow:
    """From a picture to 25 frames, the number that this model was trained with."""
    note = f"25 frames of 1024 x 576.\n\n{notes(variant)}\nPut a picture of your own into Load Image."
    workflow = Workflow(f"SVD {VARIANTS[variant]}", note)
    loader = workflow.add("Model", "ImageOnlyCheckpointLoader", ckpt_name="svd_xt_1_1.safetensors")
    guided = workflow.add("Model", "VideoLinearCFGGuidance", model=loader, min_cfg=1.0)
    model = accelerated(workflow, variant, guided[0])
    start = workflow.add("First frame", "LoadImage", PREVIEW, image=PICTURE)
    conditioning = workflow.add(
        "First frame",
        "SVD_img2vid_Conditioning",
        clip_vision=loader[1],
        init_image=start,
        vae=loader[2],
        width=1024,
        height=576,
        video_frames=25,
        motion_bucket_id=127,
        fps=6,
        augmentation_level=0.0,
    )
    latent = sampled(
        workflow, "Video", model, *(conditioning[output] for output in range(3)), cfg=2.5, scheduler="karras"
    )
    frames = workflow.add("Video", "VAEDecode", samples=latent, vae=loader[2])
    workflow.add(
        "Video",
        "SaveAnimatedWEBP",
        PREVIEW,
        images=frames,
        filename_prefix=f"onlinequant/svd_{variant}",
        fps=6.0,
        lossless=False,
        quality=80,
        method="default",
    )
    return workflow


def lora_and_controlnet() -> Workflow:
    """SDXL with both, since both are where compiled models usually disappoint."""
    note = f"""\
{HOW_IT_GOES}
**Try it:** after the second run, move the strength of the LoRA, or load another one: the next picture follows at once.
The ControlNet is a model of its own, observed and compiled like the first, so it has a node of its own.
"""
    workflow = Workflow("SDXL 6 LoRA and ControlNet", note)
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    lora = workflow.add(
        "Model",
        "LoraLoader",
        model=loader[0],
        clip=loader[1],
        lora_name="sd_xl_offset_example-lora_1.0.safetensors",
        strength_model=0.5,
        strength_clip=1.0,
    )
    model = accelerated(workflow, "quantized", lora[0])
    control = workflow.add("ControlNet", "ControlNetLoader", control_net_name="diffusers_xl_canny_full.safetensors")
    control = workflow.add(
        "ControlNet", "OnlineQuantControlNet", PROGRESS, control_net=control, **DEFAULTS, **PERCENTAGE
    )
    positive, negative = prompts(workflow, lora[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    drawn = workflow.add("Edges", "LoadImage", PREVIEW, image=PICTURE)
    edges = workflow.add("Edges", "Canny", image=drawn, low_threshold=0.4, high_threshold=0.8)
    applied = workflow.add(
        "Edges",
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=edges,
        strength=0.6,
        start_percent=0.0,
        end_percent=1.0,
        vae=loader[2],
    )
    latent = sampled(workflow, "Picture", model, applied[0], applied[1], empty[0])
    saved(workflow, "Picture", latent, loader[2], "sdxl_lora_controlnet")
    report(workflow, model, latent)
    return workflow


def comparison() -> Workflow:
    """SDXL twice from one seed: the one workflow that says what 8 bit costs in quality."""
    note = f"""\
Both pictures come from one seed, and Compare shows them beside their difference, with PSNR and SSIM.

{HOW_IT_GOES}
**So the first comparison shows no difference**: both pictures are drawn in float. Press Run again.
"""
    workflow = Workflow("SDXL 5 float and 8 bit compared", note)
    loader = workflow.add("Model", "CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors")
    model = accelerated(workflow, "quantized", loader[0])
    positive, negative = prompts(workflow, loader[1])
    empty = workflow.add("Prompt", "EmptyLatentImage", width=1024, height=1024, batch_size=1)
    seed = workflow.add("Prompt", "PrimitiveInt", Look("Seed of both pictures"), value=SEED)
    decoded = []
    for group, denoiser in (("In float", loader[0]), ("In 8 bit", model)):
        latent = sampled(workflow, group, denoiser, positive[0], negative[0], empty[0], seed=seed[0])
        decoded.append(saved(workflow, group, latent, loader[2], f"sdxl_{group.lower().replace(' ', '_')}"))
    reference, picture = decoded
    workflow.add("Report", "OnlineQuantCompare", Look(room=400), picture=picture, reference=reference)
    report(workflow, model, picture, reference=reference)
    return workflow


def workflows() -> dict[str, Workflow]:
    """All of them, by the names of their files in the API's format."""
    made = {}
    for variant in ("baseline", "compiled", "quantized"):
        made[f"sdxl_{variant}"] = text_to_image("SDXL", variant, "sd_xl_base_1.0.safetensors", 1024)
        made[f"sd15_{variant}"] = text_to_image("SD15", variant, "v1-5-pruned-emaonly.safetensors", 512)
        made[f"svd_{variant}"] = image_to_video(variant)
    more = {"sdxl_report": reported(), "sdxl_compare": comparison(), "sdxl_lora_controlnet": lora_and_controlnet()}
    return {**made, **more}
