"""Whether the 8-bit ops compute the right thing on a device: each once, on tiny tensors, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import ops
from ..graph.conv_geometry import ConvGeometry
from ..kernels import reference
from ..kernels.formats import Format
from ..kernels.operands import Operands
from ..tensors import CHANNELS_LAST

# The relative error of an op in this format on this device.
Check = Callable[[Format, torch.device], float]
_CHANNELS = 80  # not a whole block of any kernel
GEGLU_WEIGHT = (96, _CHANNELS)


class Outcome(NamedTuple):
    """Whether a check was passed, and its relative error or what went wrong instead."""

    passed: bool
    text: str


def outcome(check: Check, format: Format, device: torch.device) -> Outcome:
    """Run a check; whatever it raises is its outcome."""
    try:
        error = check(format, device)
    except Exception as exception:
        return Outcome(False, f"{type(exception).__name__}: {exception}".splitlines()[0])
    # Float32 sums in another order than the float64 oracle, and tensor cores add up fp8 products with 14 bits; anything
    # beyond is a wrong kernel.
    tolerance = 5e-3 if format.activation.is_floating_point else 1e-4
    return Outcome(error < tolerance, f"relative error {error:.2g} against the reference")


def _quantize(format: Format, device: torch.device) -> float:
    x = torch.linspace(-1, 1, 64, dtype=torch.float32, device=device)
    qparams = _qparams(format, device)
    error = (reference.dequantize(ops.quantize(x, qparams, format.activation, False), qparams) - x).abs().max()
    return 0.0 if error <= qparams[2] else float(error)


def _linear(format: Format, device: torch.device, rows: int) -> float:
    operands = _operands(format, device, (rows, _CHANNELS), (48, _CHANNELS))
    got = ops.linear(*operands, torch.float32)
    return _relative_error(got, reference.linear(_on_cpu(operands), torch.float64))


def _conv(format: Format, device: torch.device, dimensions: int) -> float:
    operands = _operands(format, device, (1, _CHANNELS, *(6,) * dimensions), (48, _CHANNELS, *(3,) * dimensions))
    geometry = ConvGeometry(*[(1,) * dimensions] * 3)
    got = ops.conv(*operands, *geometry, torch.float32)
    return _relative_error(got, reference.conv(_on_cpu(operands), geometry, torch.float64))


def _geglu(format: Format, device: torch.device) -> float:
    operands = _operands(format, device, (20, _CHANNELS), GEGLU_WEIGHT)
    got = ops.geglu(*operands, None, torch.float32)
    return _relative_error(got, reference.geglu(_on_cpu(operands), torch.float64))


def _layer_norm(format: Format, device: torch.device) -> float:
    x, residual = _noise(2, 20, _CHANNELS)
    weight, bias = _noise(2, _CHANNELS)
    qparams = _qparams(format, device, 8)
    given = (tensor.to(device) for tensor in (x, residual, weight, bias))
    total, xq = ops.layer_norm(*given, 1e-5, qparams, format.activation)
    exact = reference.group_norm(x + residual, 1, weight, bias, 1e-5, False)  # one group: of each row
    return _relative_error(total, x + residual) + _rounding_error(xq, qparams, exact)


def _group_norm(format: Format, device: torch.device) -> float:
    x = _noise(2, _CHANNELS, 6, 7)
    weight, bias = _noise(2, _CHANNELS)
    qparams = _qparams(format, device, 8)
    xq = ops.group_norm(x.to(device), 8, weight.to(device), bias.to(device), 1e-5, True, qparams, format.activation)
    return _rounding_error(xq, qparams, reference.group_norm(x, 8, weight, bias, 1e-5, True))


def _operands(
    format: Format, device: torch.device, x_shape: tuple[int, ...], weight_shape: tuple[int, ...]
) -> Operands:
    """What the ops take: random ``xq``, ``qparams``, a weight, its scales and a bias; images are channels last."""
    generator = torch.Generator().manual_seed(0)

    def stored(shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype) -> torch.Tensor:
        values = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator)
        layout = CHANNELS_LAST.get(len(shape), torch.contiguous_format)
        return (values if dtype.is_floating_point else values.round()).to(dtype).to(device, memory_format=layout)

    outputs = weight_shape[0]
    scales = format.scale_shape(weight_shape)
    limit = format.weight_limit
    return Operands(
        stored(x_shape, *format.limits, format.activation),
        _qparams(format, device),
        stored(weight_shape, -limit, limit, format.weight),
        ((torch.rand(scales, generator=generator, dtype=torch.float32, device="cpu") + 0.5) / limit).to(device),
        torch.randn(outputs, generator=generator, dtype=torch.float32, device="cpu").to(device),
    )


def _qparams(format: Format, device: torch.device, largest: float = 1) -> torch.Tensor:
    """See ``ops.quantize``; for numbers up to ``largest``."""
    low, high = format.limits
    scale = 2 * largest / (high - low)
    # cuBLAS wants the scale at an address that is a multiple of 16 bytes.
    zero = round(high / 2) if low == 0 else 0
    return torch.tensor([0, 0, 1 / scale, zero, scale], dtype=torch.float32, device=device)[2:]


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").half()


def _on_cpu(operands: Operands) -> Operands:
    """For the reference, which must not depend on the device that it judges."""
    return Operands(*(tensor.cpu() for tensor in operands if tensor is not None))


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.cpu().double() - expected).norm() / expected.norm())


def _rounding_error(xq: torch.Tensor, qparams: torch.Tensor, exact: torch.Tensor) -> float:
    """How much farther ``xq`` is from ``exact`` than the nearest 8-bit numbers are: halfway, two are as near."""
    qparams = qparams.cpu()
    nearest = ops.quantize(exact, qparams, xq.dtype, False)
    distances = [(reference.dequantize(q, qparams) - exact).abs() for q in (xq.cpu(), nearest)]
    return float((distances[0] - distances[1]).norm() / exact.norm())


# By name. Of a CPU: what its graphs consist of.
CPU_CHECKS: dict[str, Check] = {
    "quantize": _quantize,
    "linear": functools.partial(_linear, rows=5),
    "conv2d": functools.partial(_conv, dimensions=2),
    "conv3d": functools.partial(_conv, dimensions=3),
}
GPU_CHECKS: dict[str, Check] = {
    "linear": functools.partial(_linear, rows=64),
    "linear of few rows": functools.partial(_linear, rows=5),  # cuBLAS has none in fp8
    "conv2d": functools.partial(_conv, dimensions=2),
    "conv3d": functools.partial(_conv, dimensions=3),
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}
