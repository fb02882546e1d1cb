"""Models with the offload hooks of accelerate and diffusers: these are replaced, and the model ends in 8 bit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.errors import OffloadHooksError
from onlinequant_backend.quantization import host_weights
from onlinequant_backend.runtime import group_hooks
from tests.helpers import tiny
from tests.helpers.eager_inductor import dynamo_graphs
from tests.helpers.hosted import hosted as hosted
from tests.helpers.hosted import on_host
from tests.helpers.small import CLOSE, compiled
from tests.helpers.tiny import net, noise, relative_error
from tests.helpers.tiny_pipeline import pipeline

pytestmark = pytest.mark.usefixtures("hosted", "inductor")
CPU = torch.device("cpu")
INPUTS = noise(1, 4, 8, 8), torch.tensor(3), noise(1, 5, 32)
X = noise(1, 4, 8, 8)
Offload = Callable[[nn.Module], object]


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch._dynamo.utils.counters.clear()


def sequential(model: nn.Module) -> None:
    accelerate.cpu_offload(model, CPU)


def dispatched(model: nn.Module) -> None:
    """Half of it offloaded to the CPU from another device, which is the CPU as well."""
    children = [name for name, _ in model.named_children()]
    places = {name: CPU if number % 2 else "cpu" for number, name in enumerate(children)}
    accelerate.dispatch_model(model, places, main_device=CPU, force_hooks=True)


def grouped(model: nn.Module, **options: Any) -> None:
    kind = {"offload_type": "block_level", "num_blocks_per_group": 1, **options}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **kind)


leaves = functools.partial(grouped, offload_type="leaf_level")
KINDS = {"sequential": sequential, "dispatched": dispatched, "blocks": grouped, "leaves": leaves}
kinds = pytest.mark.parametrize("offload", KINDS.values(), ids=KINDS)


def is_hooked(model: nn.Module) -> bool:
    """Whether any part of a model below its root has a hook that offloads it."""
    return any(
        "_hf_hook" in vars(module) or "group_offloading" in getattr(vars(module).get("_diffusers_hook"), "hooks", ())
        for name, module in model.named_modules()
        if name
    )


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> UNet2DConditionModel:
    return pipeline(tmp_path_factory.mktemp("tokenizer")).unet.eval().requires_grad_(False)


def copy_of(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    other = UNet2DConditionModel.from_config(unet.config).eval().requires_grad_(False)
    other.load_state_dict(unet.state_dict())
    return other


@kinds
@pytest.mark.parametrize("is_compiled_first", [False, True], ids=["hooks first", "compiled first"])
@torch.no_grad()
def test_a_unet_ends_in_8_bit(offload: Offload, is_compiled_first: bool, unet: UNet2DConditionModel) -> None:
    model = copy_of(unet)
    if is_compiled_first:
        step = compiled(model)
        offload(step)  # type: ignore[arg-type]
    else:
        offload(model)
        step = compiled(model)
    weights = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    expected = unet(*INPUTS).sample
    # Only where the root's own hook is the first to run is that noticed before any has run.
    in_time = not is_compiled_first and offload is not leaves
    for call in range(5):
        result = step(*INPUTS).sample  # type: ignore[attr-defined]
        assert relative_error(result, expected) < (1e-5 if call < 2 or (call == 2 and not in_time) else CLOSE)
        if call < 2:
            assert on_host(model) == (weights if call or in_time else set())
    assert on_host(model) == {f"{each.name}.weight" for each in oq.reports()[-1].decisions if each.quantized}
    assert not torch.equal(result, expected)
    assert (oq.reports()[-1].phase, dynamo_graphs()) == ("quantized", 1)
    assert not is_hooked(model)
    for name, value in unet.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)

    for each in (model, unet):
        each.conv_out.weight.data.mul_(-1.5)
    try:
        expected = unet(*INPUTS).sample
    finally:
        unet.conv_out.weight.data.div_(-1.5)
    for _ in range(2):
        assert relative_error(step(*INPUTS).sample, expected) < CLOSE  # type: ignore[attr-defined]
    assert dynamo_graphs() == 1


def enable_sequential_cpu_offload(pipe: Any) -> None:
    """As the method of this name, which knows no CPU without a number."""
    pipe.remove_all_hooks()
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        sequential(part.to("cpu"))


@torch.no_grad()
def test_the_other_parts_of_a_pipeline_keep_their_hooks(tmp_path: Path) -> None:
    pipe, plain = pipeline(tmp_path), pipeline(tmp_path)
    enable_sequential_cpu_offload(pipe)
    pipe.unet.compile(backend=oq.onlinequant, options={**tiny.OPTIONS, "calibration_steps": 3})
    for each in (pipe, plain):
        each.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Any:
        latents = noise(1, 4, 8, 8, seed=2)
        found = pipe("a", num_inference_steps=3, latents=latents, height=8, width=8, output_type="latent").images
        return torch.as_tensor(found)

    expected = draw(plain)
    with oq.sampling_run(steps=3):
        assert relative_error(draw(pipe), expected) < 1e-5
    assert relative_error(draw(pipe), expected) < CLOSE
    assert len(oq.reports()) == 1 and oq.copied_bytes(pipe.unet) and not is_hooked(pipe.unet)
    assert is_hooked(pipe.vae) and is_hooked(pipe.text_encoder)
    assert all(weight.is_meta for weight in pipe.vae.parameters())
    assert pipe._execution_device == CPU
    enable_sequential_cpu_offload(pipe)  # as after a LoRA was loaded
    assert all(weight.is_meta for weight in pipe.unet.parameters())
    for _ in range(2):
        assert relative_error(draw(pipe), expected) < CLOSE
    assert on_host(pipe.unet)


def in_place(model: nn.Module) -> Callable[..., Any]:
    model.compile(backend=oq.onlinequant, options=tiny.OPTIONS)
    return model


def as_a_function(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(lambda x: model(x), backend=oq.onlinequant, options=tiny.OPTIONS)


def forward_only(model: nn.Module) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend=oq.onlinequant, options=tiny.OPTIONS)
    return model


def by_block(model: nn.Module) -> Callable[..., Any]:
    for block in model.blocks:
        block.compile(backend=oq.onlinequant, options=tiny.OPTIONS)
    return model


@pytest.mark.parametrize("offload", [sequential, leaves])
@pytest.mark.parametrize("compile_it", [in_place, as_a_function, forward_only, by_block])
@torch.no_grad()
def test_every_way_to_compile(offload: Offload, compile_it: Callable[..., Any]) -> None:
    if offload is leaves and compile_it is forward_only:
        pytest.skip("the compiled method contains the hook: it stays")
    model, expected = net(), net()(X)
    offload(model)
    step = compile_it(model)
    for _ in range(6):
        result = step(X)
        assert relative_error(result, expected) < CLOSE
    assert not torch.equal(result, expected)
    assert {report.phase for report in oq.reports() if report.decisions} == {"quantized"}
    assert on_host(model)


@kinds
def test_also_in_inference_mode_and_of_weights_with_gradients(offload: Offload) -> None:
    model, expected = net().requires_grad_(), net()(X)
    offload(model)
    step = compiled(model)
    with torch.inference_mode():
        for _ in range(5):
            assert relative_error(step(X), expected) < CLOSE
    assert on_host(model) and all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.is_inference() for weight in model.parameters())


@kinds
@torch.no_grad()
def test_place_removes_them_by_hand(offload: Offload) -> None:
    model, expected = net(), net()(X)
    offload(model)
    assert oq.place(model, "cpu") is model
    assert not is_hooked(model) and on_host(model)
    assert torch.equal(model(X), expected)
    assert oq.place(model, "cpu") is model
    assert torch.equal(model(X), expected)


@kinds
@torch.no_grad()
def test_it_is_said_once(offload: Offload, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    offload(model)
    step = compiled(model)
    with caplog.at_level(logging.INFO, "onlinequant"):
        for _ in range(4):
            step(X)
    said = [record.getMessage() for record in caplog.records if "hooks" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("the offload hooks of Net are replaced: its float weights stay in")


def on_the_disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def groups_on_the_disk(model: nn.Module, folder: Path) -> None:
    leaves(model, offload_to_disk_path=str(folder))


def replaced_later(model: nn.Module, folder: Path, offload: Offload = sequential) -> None:
    offload(model)
    layer = model.conv_in
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def with_another_hook(model: nn.Module, folder: Path) -> None:
    sequential(model)
    accelerate.hooks.add_hook_to_module(model.conv_in, accelerate.hooks.ModelHook(), append=True)


@pytest.mark.parametrize(
    ("offload", "reason"),
    [
        (on_the_disk, "the values of .* are not in the memory"),
        (groups_on_the_disk, "weights are in files"),
        (replaced_later, "the forward method of a Conv2d was replaced"),
        (functools.partial(replaced_later, offload=leaves), "the forward method of a Conv2d was replaced"),
        (with_another_hook, "a Conv2d also has a ModelHook"),
    ],
)
@torch.no_grad()
def test_what_is_not_understood_stays(
    offload: Callable[..., Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = net(), net()
    offload(model, tmp_path)
    if isinstance(offload, functools.partial) or offload is replaced_later:
        plain.conv_in.register_forward_hook(lambda module, args, result: result * 2)
    step, expected = compiled(model), plain(X)
    for _ in range(4):
        assert relative_error(step(X), expected) < CLOSE
    assert is_hooked(model)
    with pytest.raises(OffloadHooksError, match=reason):
        oq.place(model, "cpu")
    assert caplog.text.count("the offload hooks of Net stay") == 1
    assert relative_error(model(X), expected) < CLOSE


@pytest.mark.parametrize("offload", [sequential, grouped])
@torch.no_grad()
def test_without_memory_they_stay(
    offload: Offload, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, expected = net(), net()(X)
    offload(model)
    step = compiled(model)
    free = iter([0, *[10**10] * 3])  # too little for all weights, enough for some
    monkeypatch.setattr(host_weights, "free_memory", lambda: (next(free, 0), 10**10))
    for _ in range(4):
        assert relative_error(step(X), expected) < CLOSE
    assert is_hooked(model) and "free" in caplog.text
    assert relative_error(model(X), expected) < 1e-5


@kinds
@torch.no_grad()
def test_with_float_weights_on_the_device_they_stay(offload: Offload) -> None:
    model, expected = net(), net()(X)
    offload(model)
    step = compiled(model, float_weights="device")
    for _ in range(4):
        assert relative_error(step(X), expected) < CLOSE
    assert is_hooked(model)


@kinds
@torch.no_grad()
def test_with_a_device_that_cannot_read_host_memory_they_stay(
    offload: Offload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_weights, "supports", lambda device: False)
    model, expected = net(), net()(X)
    offload(model)
    step = compiled(model)
    for _ in range(4):
        assert relative_error(step(X), expected) < CLOSE
    assert is_hooked(model)


@torch.no_grad()
def test_hooks_that_do_something_else_stay() -> None:
    model = net()
    apply_layerwise_casting(model, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = model(X)
    grouped(model)
    oq.place(model, "cpu")
    assert not is_hooked(model)
    assert "layerwise_casting" in model.conv_in._diffusers_hook.hooks
    assert torch.equal(model(X), expected)

    whole, _ = accelerate.cpu_offload_with_hook(net(), CPU)
    step = compiled(whole)
    for _ in range(4):
        assert relative_error(step(X), net()(X)) < CLOSE
    assert isinstance(whole._hf_hook, CpuOffload) and oq.reports()[-1].phase == "quantized"


@torch.no_grad()
def test_inputs_are_moved_as_before() -> None:
    model = net()
    sequential(model)
    oq.place(model, "cpu")
    hook = model._hf_hook
    assert type(hook) is AlignDevicesHook
    assert (hook.io_same_device, hook.offload, hook.execution_device) == (True, False, CPU)

    model = net()
    grouped(model)
    oq.place(model, "cpu")
    moved = HookRegistry.check_if_exists_or_initialize(model).hooks[group_hooks._INPUTS]
    (x,), named = moved.pre_forward(model.to("meta"), X, y=[X, 1])
    assert x.is_meta and named["y"][0].is_meta and named["y"][1] == 1
