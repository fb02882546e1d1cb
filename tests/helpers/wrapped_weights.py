"""Stand-ins for the classes in which torchao and ComfyUI keep 8-bit weights, and the real ones of torchao."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map

_PARTS = ("qdata", "scale", "zero_point", "act_pre_scale")


class _Wrapped(torch.Tensor):
    """Values of 8 bits and a scale of [1] or [N, 1] that look like a matrix of floats."""

    qdata: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    act_pre_scale: torch.Tensor | None

    @staticmethod
    def __new__(cls, dtype: torch.dtype, qdata: torch.Tensor, **parts: torch.Tensor | None) -> _Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype, device=qdata.device)  # type: ignore[attr-defined]
        made.qdata = qdata
        for name in _PARTS[1:]:
            setattr(made, name, parts.get(name))
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return [name for name in _PARTS if getattr(self, name) is not None], self.dtype

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, torch.Tensor], dtype: torch.dtype, _size: object, _stride: object
    ) -> _Wrapped:
        return cls(dtype, **parts)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:  # type: ignore[override]
        values = self.qdata.float()
        if self.zero_point is not None:
            values = values - self.zero_point
        return (values * self.scale).to(output_dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            names, dtype = args[0].__tensor_flatten__()
            return cls(dtype, **{name: func(getattr(args[0], name)) for name in names})
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))


def _plain(value: Any) -> Any:
    return value.dequantize() if isinstance(value, _Wrapped) else value


class Int8Tensor(_Wrapped):
    """torchao's."""


class Float8Tensor(_Wrapped):
    """torchao's."""


class QuantizedTensor(_Wrapped):
    """ComfyUI's, of whichever layout a test gives it."""

    _layout_cls = "TensorCoreFP8E4M3Layout"

    @property
    def _qdata(self) -> torch.Tensor:
        return self.qdata

    @property
    def _params(self) -> SimpleNamespace:
        return SimpleNamespace(scale=self.scale)


class Unknown(_Wrapped):
    """Nobody's."""


Int8Tensor.__module__ = Float8Tensor.__module__ = "torchao.stand_in"
QuantizedTensor.__module__ = "comfy_kitchen.stand_in"


def wrapped(
    kind: type[_Wrapped],
    weight: torch.Tensor,
    values: torch.dtype = torch.float8_e4m3fn,
    per_row: bool = True,
    **parts: torch.Tensor,
) -> Any:
    """A float matrix in 8 bit, with scales that are no powers of two."""
    largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax().view(1)
    scale = largest.float() / (448 if values.is_floating_point else 127)
    q = weight / scale
    return kind(weight.dtype, qdata=(q if values.is_floating_point else q.round()).to(values), scale=scale, **parts)
