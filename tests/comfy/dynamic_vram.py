"""Our twins and ComfyUI's own memory management, with dynamic VRAM, on a "GPU" that is the CPU under another name.

Run by ``test_residency.py`` in ComfyUI's environment: ``python dynamic_vram.py INSTALLATION [TEST ...]``. It stands in
for the driver alone (pages of weights that are loaded on demand, pinned memory, how much is free); whatever decides is
ComfyUI's.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch

installation, chosen, root = Path(sys.argv[1]), sys.argv[2:], Path(__file__).parents[2]
sys.path[:0] = [str(root), str(installation / "ComfyUI")]
sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
exec((installation / "tools/tv_shim.py").read_text())  # ComfyUI cannot be imported without it here

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.controlnet  # noqa: E402
import comfy.model_management as management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfy_aimdo.host_buffer  # noqa: E402
import comfy_aimdo.model_vbar  # noqa: E402

import onlinequant_backend as oq  # noqa: E402
from onlinequant_backend.comfy_integration import residency  # noqa: E402
from onlinequant_backend.comfy_integration.control_patch import quantize_control_net  # noqa: E402
from onlinequant_backend.comfy_integration.model_patch import quantize_model  # noqa: E402

GPU = torch.device("cpu", 0)
CHECKPOINT = installation / "models/checkpoints/tiny_sd15.safetensors"
CONTROL_NET = installation / "models/controlnet/tiny_sd15_cn.safetensors"
VIDEO = installation / "models/checkpoints/tiny_svd.safetensors"
LORA = installation / "models/loras/tiny_sd15_lora.safetensors"


class Pages:
    """Stands in for ``ModelVBAR``: whatever has been asked for is there until it is freed."""

    def __init__(self, *_arguments: Any) -> None:
        self.bytes = 0

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> tuple[Pages, int, int]:
        self.bytes += size
        return self, 0, size

    def loaded_size(self) -> int:
        return self.bytes

    def free_memory(self, size: float) -> int:
        freed, self.bytes = self.bytes, 0
        return freed


class HostBuffer:
    """Stands in for pinned memory."""

    def __init__(self, *_arguments: Any) -> None:
        self.size = 0


class Log(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


comfy_aimdo.model_vbar.ModelVBAR = Pages
comfy_aimdo.model_vbar.vbar_unpin = lambda _pages: None
comfy_aimdo.host_buffer.HostBuffer = HostBuffer
comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
management.is_device_cpu = lambda device: device == torch.device("cpu")
management.get_torch_device = lambda: GPU
management.get_all_torch_devices = lambda exclude_current=False: [GPU]
management.unet_offload_device = lambda: torch.device("cpu")
management.vram_state = management.VRAMState.NORMAL_VRAM
management.lowvram_available = True
free = {"bytes": 1e12}
management.get_free_memory = lambda device=None, torch_free_too=False: (
    (free["bytes"], 0) if torch_free_too else free["bytes"]
)
log = Log()
logging.getLogger().addHandler(log)
logging.getLogger().setLevel(logging.INFO)


def loader() -> Any:
    """A checkpoint as its loader gives it."""
    model = comfy.sd.load_checkpoint_guess_config(str(CHECKPOINT), output_vae=False, output_clip=False)[0]
    assert model.is_dynamic() and model.load_device == GPU
    return model


def with_lora(model: Any, strength: float) -> Any:
    """As ComfyUI's node adds one."""
    if not strength:
        return model
    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(LORA)), strength, 0)[0]


def node(model: Any) -> Any:
    return quantize_model(model, {}, True, lambda _update: None)


def load(*models: Any) -> None:
    """As a sampler does."""
    management.load_models_gpu(list(models))


def on_gpu(model: Any) -> int:
    """The bytes that a model takes there."""
    pages = getattr(model, "dynamic_vbars", {}).get(GPU)
    return model.model_loaded_weight_memory + (0 if pages is None else pages.bytes)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def loaded_by_comfyui(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model with its LoRAs, without our doing anything."""
    plain = model.clone(disable_dynamic=True)
    load(plain)
    found = weights(plain.model)
    management.unload_model_and_clones(plain)
    return found


def test_loras_before_the_node_share_one_twin() -> None:
    model, moved = loader(), []
    strengths = (0.0, 1.0, 0.5, 0.0, 1.0)
    expected = {strength: loaded_by_comfyui(with_lora(model, strength)) for strength in set(strengths)}
    assert not same(expected[1.0], expected[0.5])
    with mock.patch("comfy.sd.load_checkpoint_guess_config", wraps=comfy.sd.load_checkpoint_guess_config) as loads:
        model.cached_patcher_init = (comfy.sd.load_checkpoint_guess_config, *model.cached_patcher_init[1:])
        clone = node(model)
        twin = clone.model
        assert twin is not model.model
        load(clone)
        twin.to = moved.append  # type: ignore[method-assign, assignment]
        for strength in strengths:
            clone = node(with_lora(model, strength))  # and the old one is gone, as from ComfyUI's cache
            load(clone)
            assert clone.model is twin and same(weights(twin), expected[strength]), strength
            assert on_gpu(twin) == clone.loaded_size() == clone.model_size()
    assert not loads.called
    # ComfyUI would move all of it to the CPU at each change.
    assert set(moved) == {GPU}, moved
    assert [loaded.model for loaded in management.current_loaded_models] == [clone]
    del twin.to
    with torch.inference_mode(False):  # as ComfyUI does between prompts
        management.unload_all_models()
    assert same(weights(twin), expected[0.0]) and on_gpu(twin) == 0
    assert all(weight.is_inference() for weight in twin.parameters()), "Dynamo would trace anew"


def test_a_lora_that_does_not_fit_is_left_to_comfyui() -> None:
    model = loader()
    load(node(model))
    clone = node(with_lora(model, 1.0))
    moved: list[Any] = []
    clone.model.to = lambda device: moved.append(device)
    free["bytes"] = management.minimum_inference_memory() - 10e6
    try:
        load(clone)
    finally:
        free["bytes"] = 1e12
    assert torch.device("cpu") in moved


def test_one_copy_is_on_the_gpu() -> None:
    model = loader()
    clone = node(model)
    twin, original = clone.model, model.model
    load(model)
    assert on_gpu(original) > 0
    seen: list[int] = []
    twin.to = lambda device: seen.append(on_gpu(original))
    load(clone)
    assert seen[0] == 0, "the other copy has to go first"
    del twin.to
    assert on_gpu(twin) > 0 and on_gpu(original) == 0
    other = with_lora(model, 1.0)  # a baseline with a LoRA, made after the node was
    for baseline in (model, other):
        load(baseline)
        assert on_gpu(twin) == 0 and on_gpu(original) > 0
        load(clone)
        assert on_gpu(twin) > 0 and on_gpu(original) == 0
    load(clone, model)  # two models of one run
    assert on_gpu(twin) > 0 and on_gpu(original) > 0


def test_a_twin_whose_clones_are_gone_is_still_known_and_dies_with_its_model() -> None:
    model = loader()
    clone = node(with_lora(model, 1.0))
    load(clone)
    twin, guards = weakref.ref(clone.model), (weakref.ref(model.model), weakref.ref(clone.model))
    del clone
    (loaded,) = management.current_loaded_models
    assert loaded.model is not None and loaded.model.model is twin()
    load(model)
    living = twin()
    assert living is not None and on_gpu(living) == 0
    load(node(model))
    del model, living, loaded
    gc.collect()
    assert not any(guard() is not None for guard in guards)
    assert not residency._twins and not residency._originals
    assert not management.current_loaded_models


def test_what_is_unloaded_is_released() -> None:
    released: list[Any] = []
    with mock.patch.object(oq, "release", lambda module: released.append(module) or 0):
        model = loader()
        clone = node(model)
        for through_a_clone in (True, False):  # such as a LoRA after the node
            sampled = with_lora(clone, 1.0) if through_a_clone else clone
            load(sampled)
            released.clear()
            load(clone)  # another clone takes over
            assert not released
            management.unload_all_models()
            assert released == [clone.model.diffusion_model]
            load(sampled)
            released.clear()
            management.current_loaded_models[0].model_unload(1000)  # a part of it
            assert released == [clone.model.diffusion_model]


def test_8_bit_copies_count() -> None:
    model = loader()
    clone = node(model)
    own = clone.model_size()
    assert own == management.module_size(clone.model)
    load(clone)
    (loaded,) = management.current_loaded_models
    assert clone.loaded_size() == own
    with mock.patch.object(oq, "copied_bytes", return_value=1000):
        assert clone.model_size() == with_lora(clone, 1.0).model_size() == clone.loaded_size() == own + 1000
        assert loaded.model_memory_required(GPU) == 0
        load(with_lora(clone, 1.0))
        assert clone.loaded_size() == own + 1000
    assert loaded.model_memory_required(GPU) == 1000  # they will be back
    management.unload_all_models()
    clone = node(model)
    assert clone.loaded_size() == 0 and clone.model_size() == own + 1000


def test_other_loaders() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "unet.safetensors"
        prefix = "model.diffusion_model."
        weights = comfy.utils.load_torch_file(str(CHECKPOINT)).items()
        unet_weights = {name.removeprefix(prefix): weight for name, weight in weights if name.startswith(prefix)}
        comfy.utils.save_torch_file(unet_weights, str(file))
        unet = comfy.sd.load_diffusion_model(str(file))
        video = comfy.sd.load_checkpoint_guess_config(str(VIDEO), output_vae=False, output_clipvision=True)[0]
        for model in (unet, video):
            clones = [node(model), node(model.clone())]
            assert not clones[0].is_dynamic() and clones[0].model is clones[1].model is not model.model
            load(clones[1])


def test_a_model_that_was_not_loaded_from_a_file_has_a_twin() -> None:
    model = loader()
    model.cached_patcher_init = None
    clone = node(model)
    assert not clone.is_dynamic() and clone.model is not model.model
    load(clone)
    assert on_gpu(clone.model) > 0 == on_gpu(model.model)


def test_a_twin_has_nothing_of_what_the_last_run_has_put_in_place() -> None:
    """Such as the model sampling of a node that is taken away again."""
    model = loader()
    before = model.model.model_sampling
    other = model.clone()
    other.add_object_patch("model_sampling", torch.nn.Identity())
    load(other)
    assert model.model.model_sampling is not before
    clone = node(model)
    assert type(clone.model.model_sampling) is type(before) and model.model.model_sampling is before
    load(other)
    assert model.model.model_sampling is not before


def test_a_twin_has_the_types_that_weights_are_used_with() -> None:
    """The file has float16, and ComfyUI's model is in float32 here."""
    model = loader()
    clone = node(model)
    assert {weight.dtype for weight in model.model.diffusion_model.parameters()} == {torch.float16}
    assert {weight.dtype for weight in clone.model.diffusion_model.parameters()} == {torch.float32}
    assert clone.model_size() > model.model_size()
    load(clone)
    assert on_gpu(clone.model) == clone.model_size()


def test_a_control_net_has_a_twin() -> None:
    control = comfy.controlnet.load_controlnet(str(CONTROL_NET))
    original = control.control_model
    assert control.control_model_wrapped.is_dynamic()
    expected = weights(original)
    load(control.control_model_wrapped)  # which leaves pages and more in its modules
    assert on_gpu(original) > 0 and any(hasattr(module, "_v") for module in original.modules())
    ours = [quantize_control_net(control, {}, True, lambda _update: None) for _ in range(2)]
    (patcher,), twin = ours[0].copy().get_models(), ours[0].control_model
    assert all(one.control_model is twin for one in ours) and patcher.model is twin is not original
    assert not patcher.is_dynamic() and on_gpu(original) == 0
    assert not any(hasattr(module, "_v") for module in twin.modules())
    load(patcher)
    assert same(weights(twin), expected) and on_gpu(twin) == patcher.model_size() > 0
    x, hint = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 128, 128)
    results = twin(x=x, hint=hint, timesteps=torch.tensor([5.0]), context=torch.randn(1, 77, 768))
    assert results["output"] and all(torch.isfinite(result).all() for result in results["output"])
    load(control.control_model_wrapped)
    assert on_gpu(twin) == 0 and on_gpu(original) > 0 and same(weights(original), expected)
    load(patcher)
    assert on_gpu(twin) > 0 and on_gpu(original) == 0 and same(weights(original), expected)
    with mock.patch.object(oq, "release", return_value=0) as release:
        management.unload_all_models()
    release.assert_called_with(twin)
    release.reset_mock()
    guards = weakref.ref(original), weakref.ref(twin)
    del control, original, twin, ours, patcher
    gc.collect()
    assert not any(guard() is not None for guard in guards)


if __name__ == "__main__":
    with torch.inference_mode():
        for name in chosen or [name for name in globals() if name.startswith("test_")]:
            globals()[name]()
            management.unload_all_models()
            gc.collect()
    assert not [line for line in log.lines if "memory leak" in line], log.lines
