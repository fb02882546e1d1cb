"""The backend with the real Inductor: what only a real compile can show. Few compiles, since each takes seconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import onlinequant_backend as oq
from onlinequant_backend.torch_internals import inductor_interface, torch_settings
from tests.helpers.reports import layers
from tests.helpers.small import CLOSE
from tests.helpers.tiny import OPTIONS, net, noise, relative_error


def phases() -> list[str]:
    return [report.phase for report in oq.reports()]


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [False, True])
def test_float32(channels_last: bool) -> None:
    model = net(blocks=2)
    x = noise(2, 4, 8, 8)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        y = step(x)
        assert relative_error(y, model(x)) < CLOSE
        assert y.stride() == model(x).stride()
    assert phases() == ["quantized"]
    model.blocks[1].to_v.weight.data.mul_(-1)
    assert relative_error(step(x), model(x)) < CLOSE
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_bfloat16() -> None:
    model = net(dtype=torch.bfloat16)
    x = noise(2, 4, 8, 8, dtype=torch.bfloat16)
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
    for _ in range(4):
        y = step(x)
        assert y.dtype is torch.bfloat16
        assert relative_error(y, model(x)) < CLOSE
    assert phases() == ["quantized"]


@torch.no_grad()
def test_fp8() -> None:
    """On a CPU it is emulated. The next process, which this one plays, finds everything."""
    model, x, other = net(), noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=2)
    options = {**OPTIONS, "precision": "fp8"}
    pictures = []
    for calls_observed in (2, 0):
        step = torch.compile(model, backend=oq.onlinequant, options=options)
        for _ in range(3):
            y = step(x)
            assert relative_error(y, model(x)) < CLOSE
        assert not torch.equal(y, model(x))
        assert relative_error(step(other), model(other)) < CLOSE
        (report,) = oq.reports()
        assert (report.phase, report.precision, report.cache_hit) == ("quantized", "fp8", calls_observed == 0)
        assert report.calls_observed == calls_observed
        assert all(decision.quantized for decision in layers(report)) and len(layers(report)) == 7
        pictures.append(y)
        oq.reset()
        torch._dynamo.reset()
    assert torch.equal(*pictures)
    step = torch.compile(model, backend=oq.onlinequant, options=options)
    before = step(x)
    torch._dynamo.utils.counters.clear()
    for layer in (model.conv_in, model.blocks[0].conv, model.blocks[0].to_v):
        layer.weight.copy_(layer.weight.flip(0))
    assert relative_error(before, model(x)) > 3 * CLOSE
    assert relative_error(step(x), model(x)) < CLOSE
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_autocast() -> None:
    """Layers compute in the dtype of autocast, not in their weights'."""
    model = net()
    x = noise(2, 4, 8, 8)
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            y = step(x)
            assert y.dtype is torch.bfloat16
            assert relative_error(y, model(x)) < CLOSE
    assert phases() == ["quantized"]
    assert relative_error(step(x), model(x)) < CLOSE
    assert step(x).dtype is torch.float32


@torch.no_grad()
def test_dynamic_shapes() -> None:
    model = net()
    step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS), dynamic=True)
    for size in (8, 8, 8, 12, 12):  # the first call of another size may be done again in float
        x = noise(2, 4, size, size)
        assert relative_error(step(x), model(x)) < CLOSE
    assert phases() == ["quantized"]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_inference_mode(requires_grad: bool) -> None:
    with torch.inference_mode():
        model = net().requires_grad_(requires_grad)
        x = noise(2, 4, 8, 8)
        step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
        for _ in range(4):
            assert relative_error(step(x), model(x)) < CLOSE
        assert phases() == ["quantized"]


@torch.no_grad()
def test_a_mode_and_inductor_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    monkeypatch.setattr(
        inductor_interface, "compile_fx", lambda module, inputs, options, **_: given.append(options) or module
    )
    options = {**OPTIONS, "mode": "max-autotune-no-cudagraphs", "inductor": {"epilogue_fusion": False}}
    step = torch.compile(net(), backend=oq.onlinequant, options=options)
    for _ in range(3):
        step(noise(1, 4, 8, 8))
    assert given[0]["max_autotune"] is True
    assert given[0]["epilogue_fusion"] is False


@torch.no_grad()
def test_regional_compilation_of_a_diffusers_unet() -> None:
    """One graph for all transformer blocks of a width, each with weights of its own."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet = unet.eval().requires_grad_(False)
    inputs = (noise(1, 4, 16, 16), torch.tensor(500.0), noise(1, 7, 32))
    expected = unet(*inputs).sample
    unet.compile_repeated_blocks(backend=oq.onlinequant, options=dict(OPTIONS), dynamic=True)
    for _ in range(4):
        result = unet(*inputs).sample
        assert relative_error(result, expected) < CLOSE
    assert set(phases()) == {"quantized"}
    assert len(oq.reports()) <= 2
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.ff.net[2].weight.data.mul_(-3)
    changed = result
    torch._dynamo.utils.counters.clear()
    result = unet(*inputs).sample
    with torch.compiler.set_stance("force_eager"):
        expected = unet(*inputs).sample
    assert relative_error(changed, expected) > relative_error(result, expected)
    assert relative_error(result, expected) < CLOSE
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_a_float_precision_is_plain_inductor() -> None:
    model = net()
    x = noise(2, 4, 8, 8)
    step = torch.compile(model, backend=oq.onlinequant, options={"precision": "float"})
    assert relative_error(step(x), model(x)) < 1e-5
    report = oq.reports()[-1]
    assert report.phase == "float"
    assert report.phase_reason
    assert all("float" in decision.reason for decision in report.decisions)


def test_a_model_without_layers() -> None:
    step = torch.compile(nn.ReLU(), backend=oq.onlinequant, options=dict(OPTIONS))
    x = noise(3, 3)
    assert torch.equal(step(x), x.relu())
    assert oq.reports()[-1].phase == "float"


class Attention(nn.Module):
    """Two layers around an attention for which the kernels' order is set, as ComfyUI does."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).view(x.shape[0], x.shape[1], 3, 2, 16).permute(2, 0, 3, 1, 4)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_an_order_of_attention_kernels_does_not_keep_a_graph_out_of_the_cache() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 64, 32)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for hits in (0, 1):
        step = torch.compile(model, backend=oq.onlinequant, options=dict(OPTIONS))
        for _ in range(4):
            assert relative_error(step(x), model(x)) < CLOSE
        assert phases() == ["quantized"]
        found = counters["aot_autograd"]
        assert (found["autograd_cache_hit"], found["autograd_cache_bypass"]) == (hits, 0)
        torch._dynamo.reset()
        oq.reset()


def test_settings_are_held_against_other_threads() -> None:
    """ComfyUI's steps set the order of attention's kernels while another thread compiles."""
    order = torch._C._get_sdp_priority_order()
    with torch_settings.held_settings():
        before = torch_settings.settings()
        torch._C._set_sdp_priority_order(order[::-1])
        try:
            assert torch_settings.settings() == before
        finally:
            torch._C._set_sdp_priority_order(order)
    torch._C._set_sdp_priority_order(order[::-1])
    try:
        assert torch_settings.settings() != before
    finally:
        torch._C._set_sdp_priority_order(order)
