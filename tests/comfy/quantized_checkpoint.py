"""A ``comfy_quant`` checkpoint in ComfyUI's own classes, as on a GPU that multiplies float8, and on one that does not.

Run by ``test_own_products.py`` in ComfyUI's environment: ``python quantized_checkpoint.py INSTALLATION``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

installation, root = Path(sys.argv[1]), Path(__file__).parents[2]
sys.path[:0] = [str(root), str(installation / "ComfyUI")]
sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
exec((installation / "tools/tv_shim.py").read_text())  # ComfyUI cannot be imported without it here

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402

import onlinequant_backend as oq  # noqa: E402
from onlinequant_backend.comfy_integration.model_patch import APPLY_MODEL, KEY, quantize_model  # noqa: E402
from onlinequant_backend.torch_internals import inductor_interface  # noqa: E402

UNET = "model.diffusion_model."
CHECKPOINT = installation / "models/checkpoints/tiny_sd15.safetensors"
LORA = installation / "models/loras/tiny_sd15_lora.safetensors"
INPUTS = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 768)
OPTIONS = {
    "precision": "int8",
    "calibration_steps": 2,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 0,
}
inductor_interface.compile_fx = lambda graph, _inputs, _options, *, outside_dynamo: graph


def checkpoint() -> dict[str, torch.Tensor]:
    """The tiny UNet with every matrix in float8, with a scale, as ComfyUI saves it."""
    whole = comfy.utils.load_torch_file(str(CHECKPOINT))
    found = {name.removeprefix(UNET): tensor for name, tensor in whole.items() if name.startswith(UNET)}
    how = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    for name in [name for name, tensor in found.items() if name.endswith(".weight") and tensor.dim() == 2]:
        weight = found[name].float()
        scale = weight.abs().max() / 448
        quantized = {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
        found |= {**quantized, f"{name.removesuffix('weight')}comfy_quant": how}
    return found


def call(model: Any, hook: Any = None) -> torch.Tensor:
    """As ComfyUI's sampler calls a model."""
    executor = type("Executor", (), {"class_obj": model.model, "__call__": lambda _, *args: denoiser(*args)})()
    denoiser = model.model.diffusion_model
    result: torch.Tensor = executor(*INPUTS) if hook is None else hook(executor, *INPUTS)
    return result


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def test(multiplies_float8: bool) -> None:
    management.supports_fp8_compute = lambda device=None: multiplies_float8
    oq.reset()
    torch._dynamo.reset()
    model = comfy.sd.load_diffusion_model_state_dict(checkpoint())
    management.load_models_gpu([model])
    denoiser = model.model.diffusion_model
    quantized = {name for name, weight in denoiser.named_parameters() if type(weight).__name__ == "QuantizedTensor"}
    assert len(quantized) == 80
    size = sum(parameter.nbytes for parameter in denoiser.parameters())
    assert abs(model.model_size() - size) < 0.01 * size, (model.model_size(), size)
    switches = [layer._full_precision_mm for layer in denoiser.modules() if hasattr(layer, "_full_precision_mm")]
    ours = quantize_model(model, OPTIONS, False, lambda _update: None)
    hook = ours.get_wrappers(APPLY_MODEL, KEY)[0]
    expected = call(model)
    for _ in range(3):
        result = call(model, hook)
    assert 0 < error(result, expected) < 0.1, error(result, expected)
    (report,) = oq.reports()
    assert report.phase == "quantized", report.phase_reason
    in_8_bit = {decision.name for decision in report.decisions if decision.quantized}
    assert quantized <= {f"{name}.weight" for name in in_8_bit}, quantized
    assert ours.model_size() == model.model_size() + oq.copied_bytes(denoiser)
    after = [layer._full_precision_mm for layer in denoiser.modules() if hasattr(layer, "_full_precision_mm")]
    assert switches == after

    lora = comfy.utils.load_torch_file(str(LORA))
    patched = comfy.sd.load_lora_for_models(ours, None, lora, 1.0, 0)[0]
    management.load_models_gpu([patched])
    changed = call(model)
    assert error(changed, expected) > 0.02, error(changed, expected)
    for _ in range(2):
        result = call(model, hook)
    assert error(result, changed) < error(result, expected), (error(result, changed), error(result, expected))
    assert error(result, changed) < 0.1
    assert len(oq.reports()) == 1


with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
    os.environ["ONLINEQUANT_CACHE_DIR"] = folder
    torch.manual_seed(0)
    for does in (False, True):
        test(does)
