from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend.quantization.weight_identity import weak_key
from tests.helpers.small import CLOSE, X, compiled, small
from tests.helpers.tiny import noise, relative_error

pytestmark = pytest.mark.usefixtures("inductor")  # instead of Inductor itself


@contextlib.contextmanager
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_it_is_one_and_dies_with_its_tensor() -> None:
    tensor, died = noise(4), []
    known = weakref.ref(weak_key(tensor), died.append)
    assert known() is weak_key(tensor) is not weak_key(noise(4))
    assert weak_key(tensor)() is tensor
    del tensor
    gc.collect()
    assert known() is None and len(died) == 1


@pytest.mark.parametrize("swap", [torch.utils.swap_tensors, lambda *both: torch.utils.swap_tensors(*both)])
@pytest.mark.parametrize("also_the_other", [False, True])
def test_it_stays_with_a_tensor_that_is_swapped(also_the_other: bool, swap: Callable[..., None]) -> None:
    """Whether the function is looked up in torch now, or was before the first weak reference."""
    tensor, other = (nn.Parameter(noise(4, seed=seed)) for seed in (1, 2))
    known = weak_key(tensor)
    if also_the_other:
        assert weak_key(other) is not known
    expected = other.detach().clone()
    swap(tensor, other)
    assert torch.equal(tensor, expected)
    assert weak_key(tensor) is known and known() is tensor


def test_what_torch_does_not_swap_for_others_is_as_before() -> None:
    tensor, other = noise(4), noise(4)
    known, theirs = weak_key(tensor), weakref.ref(tensor)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(tensor, other)
    assert theirs() is known() is weak_key(tensor)() is tensor


@torch.no_grad()
@pytest.mark.parametrize("calls", [1, 3])
def test_a_model_whose_weights_are_swapped_goes_on(calls: int) -> None:
    """While it is observed, and in 8 bit: without being observed anew, as a model whose weights are moved."""
    model = small()
    step = compiled(model)
    for _ in range(calls):
        step(X)
    assert all(weakref.getweakrefs(parameter) for parameter in model.parameters())
    with swapping():
        model.to(torch.bfloat16)
        for _ in range(3):
            result = step(X.bfloat16())
        assert 0 < relative_error(result, model(X.bfloat16())) < CLOSE
        assert result.dtype is torch.bfloat16
        model.to(torch.float32)
        model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})
        for _ in range(3):
            result = step(X)
        assert 0 < relative_error(result, model(X)) < CLOSE
    assert all(report.phase == "quantized" for report in oq.reports())
    if calls == 3:
        assert oq.reports()[1].calls_observed == 0


@torch.no_grad()
def test_a_lora_that_is_swapped_in_is_seen() -> None:
    model = small()
    step = compiled(model)
    for _ in range(3):
        step(X)
    replaced = nn.Parameter(-model.linear.weight, requires_grad=False)
    torch.utils.swap_tensors(model.linear.weight, replaced)
    errors = [relative_error(step(X), model(X)) for _ in range(2)]
    assert max(errors) < CLOSE
    assert errors[1] > 0
    assert len(oq.reports()) == 1


@torch.no_grad()
def test_a_model_that_was_dropped_is_forgotten() -> None:
    model = small()
    known = [weakref.ref(parameter) for parameter in model.parameters()]
    step = compiled(model)
    for _ in range(3):
        step(X)
    weak_keys = [weakref.ref(weak_key(parameter)) for parameter in model.parameters()]
    del model, step
    torch._dynamo.reset()
    gc.collect()
    assert not any(reference() for reference in (*known, *weak_keys))
