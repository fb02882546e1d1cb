"""How to read weights that another library keeps in 8 bit, as tensors of a class of its own.

Only classes are read that are known to compute with ``values * scale`` and nothing else. A class that merely looks like
that may do more, such as scaling the input of its layer as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_NOT_KNOWN = "its weight is quantized already, or a tensor subclass for another reason"
# Layouts of comfy-kitchen: those of one scale for a tensor or for each row, and those that only it can read.
_OF_ONE_SCALE = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout", "TensorWiseINT8Layout")
_OF_OTHER_SCALES = ("TensorCoreMXFP8Layout",)


class Stored(NamedTuple):
    """A weight as it is stored.

    Attributes:
        values: a plain tensor [N, ...] of any float dtype or of int8.
        scale: by which they are multiplied, float32, of one value or [N, 1]; None for 1.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


def read(weight: torch.Tensor) -> Stored:
    """A weight as it is stored; in float if only its own library can read that. Raises TypeError if ``unreadable``."""
    reason = unreadable(weight)
    if reason is not None:
        raise TypeError(reason)
    weight = weight.detach()
    return _READERS[_kind(weight)](weight) if is_traceable_wrapper_subclass(weight) else Stored(weight)


def unreadable(weight: torch.Tensor) -> str | None:
    """Why a weight, which may be a fake tensor, cannot be read, or None."""
    if not is_traceable_wrapper_subclass(weight):
        return _NOT_KNOWN if type(weight).__name__ == "QuantizedTensor" else None
    if _kind(weight) == ("comfy_kitchen", "QuantizedTensor"):
        known = (*_OF_ONE_SCALE, *_OF_OTHER_SCALES)
        layout = getattr(weight, "_layout_cls", None)
        return None if layout in known else f"its weight is quantized already, as {layout}"
    if _kind(weight) not in _READERS:
        return _NOT_KNOWN
    if getattr(weight, "act_pre_scale", None) is not None:
        return "its weight is quantized already, and scales the layer's input as well"
    return None


def in_float(weight: torch.Tensor) -> torch.Tensor:
    """The float values of a weight: itself if it is plain and not in int8."""
    values, scale = read(weight)
    return values if scale is None else values.float() * scale


def _comfy(weight: Any) -> Stored:
    parameters = weight._params
    rearranged = any(getattr(parameters, name, False) for name in ("convrot", "transposed"))
    if weight._layout_cls in _OF_OTHER_SCALES or rearranged:
        return Stored(weight.dequantize())
    return _scaled(weight, weight._qdata, parameters.scale)


def _torchao(weight: Any) -> Stored:
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None and bool(zero_point.any()):
        return Stored(weight.dequantize(output_dtype=torch.float32))
    return _scaled(weight, weight.qdata, weight.scale)


def _scaled(weight: Any, values: torch.Tensor, scale: torch.Tensor) -> Stored:
    if values.shape == weight.shape and values.dim() == 2:
        if scale.numel() == 1:
            return Stored(values, scale.float().reshape(1, 1))
        if scale.numel() == len(values) == scale.shape[0]:
            return Stored(values, scale.float().reshape(-1, 1))
    return Stored(weight.dequantize())


_READERS: dict[tuple[str, str], Callable[[Any], Stored]] = {
    ("comfy_kitchen", "QuantizedTensor"): _comfy,
    ("torchao", "Float8Tensor"): _torchao,
    ("torchao", "Int8Tensor"): _torchao,
}


def _kind(weight: torch.Tensor) -> tuple[str, str]:
    """The package and the name of its class."""
    return type(weight).__module__.partition(".")[0], type(weight).__name__
