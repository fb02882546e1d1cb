"""Whether tensors are within known bounds."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
LIMITS = [(-2.0, 2.0, 0.5)]


@pytest.fixture(autouse=True)
def _no_gpu_is_selected(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def new_check(count: int, device: str):
    from onlinequant_backend.kernels.nvidia.bounds_check import BoundsCheck

    return BoundsCheck(count, torch.empty(0, device=device).device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1500, 100_000])
def test_one_value_counts_wherever_it_is(size: int, dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and size > 1500 and dtype is not torch.float32:
        pytest.skip("the interpreter is slow")
    check = new_check(1, device)
    x = torch.ones(size, device=device)

    def is_other(position: int, value: float) -> bool:
        changed = x.clone()
        changed[position] = value
        return check.begin([changed.to(dtype)], LIMITS).end()

    assert not is_other(0, -2)
    for position, value in ((0, -4), (size // 2, 2.5), (size - 1, 1000)):
        assert not is_other(position, 2)
        assert is_other(position, value)
        if size > 1:
            for value in (0, math.nan, math.inf, -math.inf):
                assert not is_other(position, value)


def test_values_that_are_all_small_are_other_ones_unless_all_are_zero(device: str) -> None:
    check = new_check(1, device)
    x = torch.zeros(3, 500, device=device)
    assert not check.begin([x], LIMITS).end()
    x[1, 7] = 0.4
    assert check.begin([x], LIMITS).end()
    x[2, 9] = -0.5
    assert not check.begin([x], LIMITS).end()
    assert not check.begin([x.fill_(math.inf)], LIMITS).end()
    assert not check.begin([x[:0]], LIMITS).end()


def test_each_tensor_has_limits_of_its_own(device: str) -> None:
    check = new_check(3, device)
    ones = torch.ones(4, 4, 6, 2, device=device)
    limits = [(-2.0, 2.0, 0.5), (-20.0, 20.0, 5.0), (-200.0, 200.0, 50.0)]
    tensors = [ones, 10 * ones.half().to(memory_format=torch.channels_last), (100 * ones).permute(3, 2, 1, 0)[..., ::2]]
    assert not check.begin(tensors, limits).end()
    assert not check.begin([None, *tensors[1:]], limits).end()
    for factor in (4, 0.25):
        for i in range(3):
            others = [factor * x if i == j else x for j, x in enumerate(tensors)]
            assert check.begin(others, limits).end()
            wider = [(4 * low, 4 * high, least / 4) for low, high, least in limits]
            assert not check.begin(others, wider).end()
    assert not check.begin(tensors, limits).end()


def test_checks_may_overlap(device: str) -> None:
    check = new_check(1, device)
    x = torch.ones(9, device=device)
    checks = [check.begin([factor * x], LIMITS) for factor in (1, 4, 1, 0.1)]
    assert [one.end() for one in checks] == [False, True, False, True]
    assert not check.begin([x], LIMITS).end()
