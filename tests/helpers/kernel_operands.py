"""Operands for tests of the Triton kernels, and what the kernels must make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch

from onlinequant_backend import kernels
from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.kernels import reference

FORMATS = [
    pytest.param(torch.float8_e4m3fn, id="fp8"),
    pytest.param(torch.int8, id="int8"),
]
OUTPUTS = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
_GUARD = 64  # elements before and after an output


@dataclasses.dataclass(frozen=True)
class Operands:
    """``xq`` [N, *spatial, C] and ``weight`` [K, *kernel, C] with their scales."""

    xq: torch.Tensor
    qparams: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    @property
    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        """The first arguments of every kernel."""
        return self.xq, self.qparams[2:], self.weight, self.weight_scale, self.bias

    @property
    def given(self) -> kernels.Operands:
        """What the ops are given."""
        return kernels.Operands(self.xq, self.qparams, self.weight, self.weight_scale, self.bias)

    def linear(self) -> torch.Tensor:
        return reference.linear(self.given, torch.float64)

    def geglu(self) -> torch.Tensor:
        return reference.geglu(self.given, torch.float64)

    def conv(self, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:
        """What a convolution must be, [N, *spatial, K]."""
        x, w = self.xq.movedim(-1, 1), self.weight.movedim(-1, 1)
        given = self.given._replace(xq=x, weight=w)
        geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation))
        y = reference.conv(given, geometry, torch.float64)
        return y.movedim(1, -1)


def new_operands(
    x: Sequence[int],
    weight: Sequence[int],
    dtype: torch.dtype,
    device: str,
    bias: torch.dtype | None = torch.float32,
    scales: int | None = None,
) -> Operands:
    """Random ones of these shapes; ``scales``: how many the weight has, else one for each output."""
    if device == "cuda" and dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU cannot multiply fp8")
    torch.manual_seed(0)
    scale = 1 / 50
    fan_in = torch.Size(weight[1:]).numel()
    return Operands(
        _random_8bit(x, dtype).to(device),
        torch.tensor([1 / scale, 0, scale], device=device),
        _random_8bit(weight, dtype).to(device),
        ((torch.rand(scales or weight[0]) + 0.5) / (50 * fan_in**0.5)).to(device),
        None if bias is None else torch.randn(weight[0], dtype=bias).to(device),
    )


def _random_8bit(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, tuple(shape), dtype=dtype)
    return (torch.randn(tuple(shape)) * 50).to(dtype)


def grow(device: str, *sizes: int) -> tuple[int, ...]:
    """Sizes for a GPU's tiles from those for the interpreter's small ones, with tails like theirs."""
    return tuple(5 * size for size in sizes) if device == "cuda" else sizes


def output_of(
    kernel: Callable[[torch.Tensor], None], shape: Sequence[int], dtype: torch.dtype, device: str
) -> torch.Tensor:
    """What ``kernel`` writes into an output, all of it and nothing else."""
    size = torch.Size(shape).numel()
    marker = 77.0 if dtype is torch.int8 else float("nan")
    memory = torch.full((size + 2 * _GUARD,), marker, device=device).to(dtype)
    kernel(memory[_GUARD:-_GUARD].view(*shape))
    guards = torch.cat((memory[:_GUARD].float(), memory[-_GUARD:].float()))
    assert bool((guards.isnan() | (guards == marker)).all()), "the kernel wrote beyond its output"
    return memory[_GUARD:-_GUARD].view(*shape)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, operands: Operands) -> None:
    """Compare with the float64 ``expected``: as near as the output's dtype and the sums allow."""
    # Hopper's tensor cores add up fp8 products with 14 bits, 32 at a time.
    additions = operands.weight[0].numel() / 32
    sums = max(2e-3, additions * 2**-14) if actual.is_cuda and operands.xq.dtype is not torch.int8 else 0
    rounding = ROUNDING[actual.dtype]
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=(rounding + sums) * largest)


def assert_near_8bit(actual: torch.Tensor, expected: torch.Tensor, out_qparams: torch.Tensor) -> None:
    """Compare an 8-bit output with the float64 ``expected``: the next value where that is almost as near."""
    is_int8 = actual.dtype is torch.int8
    limit = 127.0 if is_int8 else 448.0
    scaled = (expected * out_qparams[0].double()).clamp(-limit, limit)
    rounded = (scaled + 0.5).floor() if is_int8 else scaled.to(actual.dtype).double()
    assert bool((actual.double().abs() == limit).any()), "nothing is clamped: the test needs a smaller range"
    step = torch.ones_like(scaled) if is_int8 else (scaled.abs() / 8).clamp(min=2**-9)
    if not is_int8 and not actual.is_cuda:
        # Triton's interpreter (3.8) loses the carry where rounding up reaches a power of two, and has subnormals wrong.
        wrong = (rounded.frexp().mantissa.abs() == 0.5) & (scaled.abs() < rounded.abs()) | (scaled.abs() < 2**-6)
        actual, scaled, rounded, step = actual[~wrong], scaled[~wrong], rounded[~wrong], step[~wrong]
    # Hopper's tensor cores add up fp8 products with 14 bits: what nearly cancels out is less exact.
    slack = 2e-3 * float(scaled.abs().max()) if actual.is_cuda and not is_int8 else 0
    off = (actual.double() - scaled).abs()
    assert bool((off <= step + slack).all())
    # What lies half-way between two values, nearly, may become either of them.
    is_tie = is_int8 & ((off - 0.5).abs() < 0.01)
    assert int(((actual.double() != rounded) & ~is_tie).sum()) <= max(1, 0.02 * actual.numel())
