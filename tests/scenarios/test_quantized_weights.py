"""Weights that somebody else has quantized, as tensors of a class of their own: these layers alone stay in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import onlinequant_backend as oq
from onlinequant_backend.analysis import graph_key
from tests.helpers.small import CLOSE, Small, X, compiled, small
from tests.helpers.tiny import relative_error

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
