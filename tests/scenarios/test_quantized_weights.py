"""Weights that somebody else has quantized, as tensors of a class of their own: known ones are quantized from what they
are, layers with others stay in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils._pytree import tree_map

import onlinequant_backend as oq
from onlinequant_backend.analysis import graph_key
from onlinequant_backend.quantization import stored_weights, weight_quantization
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.small import CLOSE, FOUND, Small, X, compiled, small
from tests.helpers.tiny import noise, relative_error
from tests.helpers.tiny_unet import ADAPTED, tiny_unet
from tests.helpers.wrapped_weights import Float8Tensor, Int8Tensor, QuantizedTensor, wrapped

# What a linear layer does with its weight. Whoever asks for values gets none.
KNOWN = ("addmm", "bmm", "expand", "linear", "mm", "t", "transpose", "unsqueeze", "view", "_unsafe_view")


class Int8Weight(torch.Tensor):
    """Integers and a scale for each row that look like a matrix of floats."""

    q: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Int8Weight:
        made = torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=dtype, device=q.device)  # type: ignore[attr-defined]
        made.q, made.scale = q, scale
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale, weight.dtype)

    def __repr__(self, **_: Any) -> str:  # torch writes some of them down, with values that are not there yet
        return f"Int8Weight({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["q", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, torch.Tensor], dtype: torch.dtype, _size: object, _stride: object
    ) -> Int8Weight:
        return cls(parts["q"], parts["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            own = args[0]
            return cls(func(own.q), func(own.scale), kwargs.get("dtype") or own.dtype)
        if func.overloadpacket.__name__ not in KNOWN:
            raise NotImplementedError(f"Int8Weight has no {func}")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def _plain(value: Any) -> Any:
    return value.q.to(value.dtype) * value.scale.to(value.dtype) if isinstance(value, Int8Weight) else value


def quantized_by_others() -> Small:
    model = small()
    model.linear.weight = nn.Parameter(Int8Weight.of(model.linear.weight), requires_grad=False)
    return model


def check_both_dtypes(model: Small, shapes: str = "auto") -> None:
    """In 8 bit but for the layer whose weight is quantized, also after torch has swapped that."""
    step = compiled(model, {"shapes": shapes})
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        x = X.to(dtype)
        for _ in range(4):
            result = step(x)
        assert 0 < relative_error(result, model(x)) < CLOSE
        report = oq.reports()[-1]
        assert report.phase == "quantized", report.phase_reason
        assert {decision.name: decision.quantized for decision in report.decisions} == {
            "conv_in": True,
            "linear": False,
            "conv_out": True,
        }
        (reason,) = [decision.reason for decision in report.decisions if not decision.quantized]
        assert reason.startswith("its weight is quantized already")


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_only_a_layer_that_is_quantized_already_stays_in_float() -> None:
    check_both_dtypes(quantized_by_others())


@torch.no_grad()
@pytest.mark.slow
def test_inductor_is_given_its_parts() -> None:
    check_both_dtypes(quantized_by_others(), shapes="static")


def test_another_of_its_scales_is_another_fingerprint() -> None:
    weights = [Int8Weight.of(torch.ones(4, 4) * size) for size in (1, 1, 2)]
    first, same, other = (graph_key.fingerprint({"weight": weight}) for weight in weights)
    assert first == same != other


INPUTS = (noise(1, 4, 16, 16), torch.tensor(500.0), noise(1, 7, 32))
STAND_INS = {"int8": (Int8Tensor, torch.int8), "float8": (Float8Tensor, torch.float8_e4m3fn)}
STAND_INS["ComfyUI"] = (QuantizedTensor, torch.float8_e4m3fn)


def by(library: str, seed: int = 0) -> UNet2DConditionModel:
    """A UNet whose linear layers a library, or a stand-in for it, has quantized."""
    unet = tiny_unet(seed)
    if library in STAND_INS:
        kind, values = STAND_INS[library]
        for layer in unet.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(wrapped(kind, layer.weight.data, values), requires_grad=False)
        return unet
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(unet, getattr(quantization, library)())
    return unet


libraries = pytest.mark.parametrize("library", [*STAND_INS, "Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])


@libraries
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@torch.no_grad()
def test_known_weights_are_quantized_from_what_they_are(
    library: str, precision: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[torch.dtype]()
    reading = stored_weights.read

    def spied(weight: torch.Tensor) -> stored_weights.Stored:
        stored = reading(weight)
        if type(weight) not in (torch.Tensor, nn.Parameter):
            read.append(stored.values.dtype)
        return stored

    monkeypatch.setattr(weight_quantization, "read", spied)
    unet = by(library)
    expected = unet(*INPUTS).sample
    step = compiled(unet, precision=precision)
    for _ in range(3):
        result = step(*INPUTS).sample
    assert 0 < relative_error(result, expected) < CLOSE
    (report,) = oq.reports()
    assert report.phase == "quantized", report.phase_reason
    assert all(decision.quantized for decision in report.decisions if decision.kind == "linear")
    assert len(set(read)) == 1 and read[0].itemsize == 1  # never in float as a whole


@libraries
@pytest.mark.parametrize("change", ["in place", "another parameter"])
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_changes_of_known_weights_are_seen(library: str, change: str) -> None:
    unet = by(library)
    step = compiled(unet)
    for _ in range(3):
        before = step(*INPUTS).sample
    for name, layer in unet.named_modules():
        if name.endswith(ADAPTED) and isinstance(layer, nn.Linear):
            if change == "in place":
                layer.weight.scale.mul_(1 if name.endswith((".to_v", ".to_k")) else -1)  # all would cancel out
            else:
                other = layer.weight.detach()
                other.qdata = other.qdata.view(torch.uint8).flip(0).view(other.qdata.dtype)
                layer.weight = nn.Parameter(other, requires_grad=False)
    expected = unet(*INPUTS).sample
    assert relative_error(expected, before) > 2 * CLOSE
    for _ in range(2):  # the first may show that ranges have changed as well
        result = step(*INPUTS).sample
    assert relative_error(result, expected) < CLOSE
    assert oq.reports()[-1].phase == "quantized"


@libraries
@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_the_cache_knows_a_model_with_known_weights(library: str) -> None:
    step = compiled(by(library))
    for _ in range(3):
        first = step(*INPUTS).sample
    torch._dynamo.reset()
    oq.reset()
    assert torch.equal(compiled(by(library))(*INPUTS).sample, first)
    (report,) = oq.reports()
    assert (report.calls_observed, report.cache_hit) == FOUND


@pytest.mark.usefixtures("inductor")
@torch.no_grad()
def test_known_weights_are_not_given_up() -> None:
    unet = by("int8")
    step = compiled(unet, free_float_weights=True, quantized_conv_percentage=0)
    for _ in range(3):
        step(*INPUTS)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_v.weight.scale.neg_()
    expected = unet(*INPUTS).sample
    for _ in range(2):
        result = step(*INPUTS).sample
    assert relative_error(result, expected) < CLOSE
