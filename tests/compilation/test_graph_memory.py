"""What may wait for the GPU is told before it is captured. The CPU and the meta device stand in for two devices."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from onlinequant_backend.compilation import graph_memory
from onlinequant_backend.compilation.graph_memory import (
    Waits,
    addresses_not_asked_about,
    others_wait_to_synchronize,
    trim_graph_memory,
)

X = torch.arange(6.0).view(2, 3)


def reason(function: Callable[[], Any]) -> str | None:
    with torch.no_grad(), Waits() as waits:
        function()
    return waits.reason


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda: X.sum().item(), "_local_scalar_dense.default waits"),
        (lambda: X.nonzero(), "nonzero.default waits"),
        (lambda: X[X > 1], "waits"),
        (lambda: bool(X.any()), "waits"),
        (lambda: X.to("meta"), "copies between devices"),
        (lambda: torch.empty(2, 3, device="meta").copy_(X), "copies between devices"),
        (lambda: torch.ops.onlinequant_test.anything(X), "onlinequant_test.anything.default may wait"),
    ],
)
def test_what_may_wait(function: Callable[[], Any], why: str) -> None:
    with torch.library._scoped_library("onlinequant_test", "DEF") as library:
        library.define("anything(Tensor x) -> Tensor")
        library.impl("anything", torch.clone, "CPU")
        assert why in (reason(function) or "")


@pytest.mark.parametrize(
    "function",
    [
        lambda: F.conv2d(X.view(1, 1, 2, 3), X.view(1, 1, 2, 3)),
        lambda: F.scaled_dot_product_attention(*[X.view(1, 1, 2, 3)] * 3),
        lambda: torch.empty(2, device="meta") * torch.tensor(2.0),  # a number, handed over with the launch
        lambda: torch.cat([X, X]).to(torch.float16),
    ],
)
def test_what_does_not(function: Callable[[], Any]) -> None:
    assert reason(function) is None


def test_others_wait_to_synchronize_until_a_capture_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("synchronized"))
    original = torch.cuda.synchronize
    with others_wait_to_synchronize():
        torch.cuda.synchronize()  # whoever captures knows what it does
        other = threading.Thread(target=torch.cuda.synchronize)
        other.start()
        other.join(0.2)
        assert other.is_alive()
        happened.append("captured")
    other.join(60)
    assert happened == ["synchronized", "captured", "synchronized"]
    assert torch.cuda.synchronize is original


def test_launchers_are_given_addresses_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    launcher = pytest.importorskip("torch._inductor.runtime.static_triton_launcher")
    seen = list[Any]()

    def run(self: Any, grid_x: int, grid_y: int, grid_z: int, stream: int, *args: Any) -> None:
        noted.append(args)  # type: ignore[name-defined]  # noqa: F821

    inductors = types.FunctionType(run.__code__, {"noted": seen})
    monkeypatch.setattr(launcher.StaticallyLaunchedTritonKernel, "run", inductors)
    monkeypatch.setattr(driver.CudaLauncher, "__call__", lambda self, *args: seen.append(args))
    bound = types.MethodType(inductors, object())  # what a compiled graph holds on to
    theirs = driver.CudaLauncher.__new__(driver.CudaLauncher)
    with addresses_not_asked_about():
        bound(1, 1, 1, 0, X, 7)
        theirs(1, 1, 1, X, 7)
    bound(1, 1, 1, 0, X, 7)
    theirs(1, 1, 1, X, 7)
    assert seen[:2] == [(X.data_ptr(), 7), (1, 1, 1, X.data_ptr(), 7)]
    assert seen[2][0] is X and seen[3][3] is X


def test_memory_is_trimmed_for_the_allocator_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed = list[int]()

    class Driver:
        def cuDeviceGraphMemTrim(self, device: int) -> int:  # noqa: N802
            trimmed.append(device)
            return 0

    monkeypatch.setattr(graph_memory, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for allocates, expected in ((False, []), (True, [1])):
        monkeypatch.setattr(graph_memory, "allocates_in_graph", lambda allocates=allocates: allocates)
        for device in (None, torch.device("cpu"), torch.device("cuda", 1)):
            trim_graph_memory(device)
        assert trimmed == expected
