from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.kernels import reference, x86
from tests.helpers.graph_probe import host_precision
from tests.helpers.kernel_cases import CONVS, DTYPES, LINEARS, TOLERANCE

TOP = 254  # of an activation
WEIGHT_TOP = round(host_precision().format.weight_limit)
# The oracles, called as the ops are.
LINEAR, CONV = ops.as_op("linear", reference), ops.as_op("conv", reference)


@dataclasses.dataclass(frozen=True)
class Operands:
    """Random operands of an 8-bit op; ``handle`` stands for the packed ``weight``."""

    xq: torch.Tensor
    qparams: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    geometry: tuple[list[int], ...] = ()

    @property
    def handle(self) -> torch.Tensor:
        handle = x86.new_handle(self.weight.shape)
        x86.pack(handle, self.weight, ConvGeometry(*map(tuple, self.geometry)) if self.geometry else None)
        return handle

    def run(self, function: Any, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``function`` is an op or its reference, ``weight`` the handle or the weight itself."""
        result = function(self.xq, self.qparams, weight, self.weight_scale, self.bias, *self.geometry, dtype)
        assert isinstance(result, torch.Tensor)
        return result


def operands(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    *geometry: int | tuple[int, ...],
    zero_point: int = 50,
    bias: bool = True,
) -> Operands:
    generator = torch.Generator().manual_seed(0)
    xq = torch.randint(0, TOP + 1, shape, generator=generator, dtype=torch.uint8)
    weight = torch.randint(-WEIGHT_TOP, WEIGHT_TOP + 1, weight_shape, generator=generator, dtype=torch.int8)
    scale = 0.01 + torch.rand(weight_shape[0], generator=generator) / 100
    dimensions = len(weight_shape) - 2
    if dimensions:
        xq = xq.contiguous(memory_format=torch.channels_last if dimensions == 2 else torch.channels_last_3d)
    return Operands(
        xq=xq,
        qparams=torch.tensor([1 / 0.03, zero_point, 0.03]),
        weight=weight,
        weight_scale=scale,
        bias=torch.randn(weight_shape[0], generator=generator) if bias else None,
        geometry=tuple([value] * dimensions if isinstance(value, int) else list(value) for value in geometry),
    )


def assert_matches_reference(given: Operands, op: Any, oracle: Any, dtype: torch.dtype) -> None:
    result, expected = given.run(op, given.handle, dtype), given.run(oracle, given.weight, torch.float64)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    # Integer sums are exact; scaling and the bias may cancel, so the last digit is that of the largest result.
    largest = float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6 * largest)
    assert torch.equal(given.run(op, given.weight, dtype), result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "outputs"), LINEARS)
def test_linear(shape: tuple[int, ...], outputs: int, bias: bool, dtype: torch.dtype) -> None:
    given = operands(shape, (outputs, shape[-1]), bias=bias)
    assert_matches_reference(given, ops.linear, LINEAR, dtype)
    assert given.run(ops.linear, given.handle, dtype).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "weight_shape", "stride", "padding", "dilation"), CONVS)
def test_conv(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...],
    dilation: int | tuple[int, ...],
    bias: bool,
    dtype: torch.dtype,
) -> None:
    given = operands(shape, weight_shape, stride, padding, dilation, bias=bias)
    assert_matches_reference(given, ops.conv, CONV, dtype)
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    assert given.run(ops.conv, given.handle, dtype).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("op", "given"),
    [
        (ops.linear, operands((2, 512), (3, 512))),
        (ops.linear, operands((64, 512), (64, 512))),
        (ops.conv, operands((1, 48, 6, 6), (3, 48, 3, 3), 1, 1, 1)),
        (ops.conv, operands((1, 56, 6, 6), (64, 56, 3, 3), 1, 0, 1)),
        (ops.conv, operands((1, 56, 4, 6, 6), (16, 56, 3, 3, 1), 1, 0, 1)),
    ],
    ids=["linear", "wide linear", "padded conv", "wide conv", "3-d conv"],
)
@pytest.mark.parametrize("zero_point", [0, 50, TOP])
@pytest.mark.parametrize("weights", ["all positive", "all negative", "alternating", "random"])
def test_extreme_values_are_summed_exactly(op: Any, given: Operands, zero_point: int, weights: str) -> None:
    """No 16-bit sum may saturate. All of these sums are whole numbers below 2**24, which float32 holds exactly."""
    weight = given.weight.clone()
    if weights != "random":
        weight.fill_(-WEIGHT_TOP if weights == "all negative" else WEIGHT_TOP)
    if weights == "alternating":
        weight[:, ::2] = -WEIGHT_TOP
    extreme = dataclasses.replace(
        given,
        xq=torch.full_like(given.xq, TOP),
        qparams=torch.tensor([1.0, zero_point, 1.0]),
        weight=weight,
        weight_scale=torch.ones_like(given.weight_scale),
        bias=None,
    )
    oracle = LINEAR if op is ops.linear else CONV
    expected = extreme.run(oracle, weight, torch.float64)
    assert expected.abs().max() < 2**24
    assert torch.equal(extreme.run(op, extreme.handle).double(), expected)


@pytest.mark.parametrize("zero_point", [0, TOP])
def test_padding_is_zero_whatever_the_zero_point(zero_point: int) -> None:
    given = operands((1, 4, 3, 3), (4, 4, 3, 3), 1, 1, 1, zero_point=zero_point)
    assert_matches_reference(given, ops.conv, CONV, torch.float32)


@pytest.mark.parametrize(
    "bias",
    [
        torch.arange(8, dtype=torch.bfloat16),
        torch.arange(8, dtype=torch.float16),
        torch.arange(16, dtype=torch.float16)[::2],
        torch.arange(16.0)[::2],
    ],
)
def test_bias_may_be_of_any_dtype_and_stride(bias: torch.Tensor) -> None:
    given = dataclasses.replace(operands((5, 32), (8, 32)), bias=bias)
    assert_matches_reference(given, ops.linear, LINEAR, torch.float32)


def test_input_may_have_any_strides() -> None:
    given = operands((1, 8, 5, 5), (4, 8, 3, 3), 1, 1, 1)
    rows_of_pixels = dataclasses.replace(given, xq=given.xq.contiguous())
    assert torch.equal(rows_of_pixels.run(ops.conv, given.weight), given.run(ops.conv, given.weight))
    linear = operands((6, 32), (8, 32))
    transposed = dataclasses.replace(linear, xq=linear.xq.t().contiguous().t())
    assert torch.equal(transposed.run(ops.linear, linear.weight), linear.run(ops.linear, linear.weight))


def test_weight_that_is_not_finite_makes_the_output_so() -> None:
    given = operands((5, 32), (8, 32))
    given.weight_scale[3] = torch.nan
    result = given.run(ops.linear, given.handle)
    assert result.isnan().all(0).tolist() == [channel == 3 for channel in range(8)]


@pytest.mark.parametrize("shape", [(64, 32), (16, 8, 3, 3), (4, 2, 3, 1, 1)])
def test_handle_has_a_weight_s_shape_but_one_byte(shape: tuple[int, ...]) -> None:
    handle = x86.new_handle(torch.Size(shape))
    assert (handle.shape, handle.dtype, handle.untyped_storage().nbytes()) == (shape, torch.int8, 1)


def test_packing_again_behind_a_handle() -> None:
    given = operands((5, 32), (8, 32))
    handle = given.handle
    before = given.run(ops.linear, handle)
    x86.pack(handle, -given.weight)
    after = given.run(ops.linear, handle)
    assert torch.equal(after, given.run(ops.linear, -given.weight))
    assert not torch.equal(after, before)


def test_handle_takes_its_packed_weight_along() -> None:
    handles = [operands((5, 32), (8, 32)).handle for _ in range(3)]
    known = len(x86._packed_weights)
    packed = [weakref.ref(x86._packed_weights[handle.data_ptr()]) for handle in handles]
    assert len({handle.data_ptr() for handle in handles}) == 3
    del handles[1]
    assert [reference() is None for reference in packed] == [False, True, False]
    assert len(x86._packed_weights) == known - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "given"),
    [
        (ops.linear, operands((4, 3, 40), (24, 40))),
        (ops.conv, operands((4, 12, 6, 5), (8, 12, 3, 3), 1, 1, 1)),
        (ops.conv, operands((4, 12, 3, 6, 5), (8, 12, 1, 3, 3), 1, (0, 1, 1), 1)),
    ],
    ids=["linear", "conv", "3-d conv"],
)
def test_what_is_not_finite_makes_its_image_nan_and_no_other(op: Any, given: Operands, dtype: torch.dtype) -> None:
    lost = dataclasses.replace(given, xq=given.xq.clone())
    lost.xq[(1, *[0] * (lost.xq.dim() - 1))] = 255
    before, after = (each.run(op, each.weight, dtype) for each in (given, lost))
    assert after[1].isnan().any()
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    if op is ops.linear:  # of which each row is on its own
        assert after[1, 0].isnan().all() and torch.equal(after[1, 1:], before[1, 1:])
    else:
        assert after[1].isnan().all()
