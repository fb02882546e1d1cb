"""Whether any of a few values of many tensors has changed, in each of the ways in which that is found out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from onlinequant_backend.quantization import weight_changes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
Snapshot = Callable[[list[torch.Tensor]], Any]


@pytest.fixture(params=["torch", "interpreter", "cuda"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Snapshot]:
    """Where tensors are, and what takes a snapshot of them: torch, or a Triton kernel interpreted or on a GPU."""
    if request.param == "torch":
        return "cpu", weight_changes._Samples
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (request.param == "interpreter"):
        pytest.skip(f"TRITON_INTERPRET=1 is {'' if interpreted else 'not '}set")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU")
        return "cuda", weight_changes._gpu_samples
    from onlinequant_backend.kernels.nvidia import snapshot

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return "cpu", snapshot.Samples


def views_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [weight_changes._sample_view(tensor) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_change_is_noticed(dtype: torch.dtype, place: tuple[str, Snapshot]) -> None:
    device, snapshot = place
    tensors = [torch.randn(4, 6, device=device).to(dtype) for _ in range(300)]  # more than a block has
    views = views_of(tensors)
    samples = snapshot(views)
    assert not samples.have_changed()
    for view in (views[0], views[150], views[-1]):
        for i in range(len(view)):
            before = view[i].clone()
            view[i] = 3.0
            assert samples.have_changed()
            assert samples.have_changed()
            view[i] = before
            assert snapshot(views).have_changed() is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_equal_to_themselves_have_not_changed(
    dtype: torch.dtype, place: tuple[str, Snapshot]
) -> None:
    device, snapshot = place
    tensors = [torch.full((4, 4), torch.nan, device=device).to(dtype), torch.zeros(4, 4, device=device).to(dtype)]
    samples = snapshot(views_of(tensors))
    assert not samples.have_changed()
    tensors[1].view(torch.uint8).fill_(0x80)
    assert samples.have_changed()  # by a bit: in float8, a minus


def test_other_values_do_not_count(place: tuple[str, Snapshot]) -> None:
    device, snapshot = place
    tensor = torch.zeros(8, 8, device=device)
    (view,) = views_of([tensor])
    samples = snapshot([view])
    kept = view.clone()
    tensor.fill_(1)
    view.copy_(kept)
    assert not samples.have_changed()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5)])
def test_shapes_and_strides(shape: tuple[int, ...], place: tuple[str, Snapshot]) -> None:
    device, snapshot = place
    whole = torch.randn(shape, device=device)
    others = [whole.clone()]
    if len(shape) > 1:
        others += [torch.randn(*shape[::-1], device=device).permute(*range(len(shape))[::-1])]
        others += [torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2]]
    for tensor in (whole, *others):
        (view,) = views_of([tensor])
        assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert 1 <= view.numel() <= 2
        samples = snapshot([view])
        assert not samples.have_changed()
        tensor.add_(1)
        assert samples.have_changed()
