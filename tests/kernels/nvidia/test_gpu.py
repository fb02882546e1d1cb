"""Which GPU a kernel is chosen for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from onlinequant_backend.kernels.nvidia import families, gpu
from onlinequant_backend.kernels.nvidia.gpu import NONE, Gpu, gpu_of

ADA = SimpleNamespace(name="Ada", major=8, minor=9, multi_processor_count=76)
HOPPER = SimpleNamespace(name="Hopper", major=9, minor=0, multi_processor_count=132)
BLACKWELL = SimpleNamespace(name="Blackwell", major=12, minor=0, multi_processor_count=170)


@pytest.fixture(autouse=True)
def _three_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gpus = [ADA, HOPPER, BLACKWELL]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus[device.index])
    for what in ("triton", "descriptors", "gluon"):
        monkeypatch.setattr(families, f"missing_{what}", lambda: None)
    gpu._gpu.cache_clear()
    yield
    gpu._gpu.cache_clear()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda:0", Gpu("Ada", 76, has_tma=False, has_gluon=False)),
        ("cuda:1", Gpu("Hopper", 132, has_tma=True, has_gluon=True)),
        ("cuda:2", Gpu("Blackwell", 170, has_tma=True, has_gluon=False)),
        ("cuda", Gpu("Hopper", 132, has_tma=True, has_gluon=True)),
        ("meta", Gpu("Hopper", 132, has_tma=True, has_gluon=True)),
        ("cpu", NONE),
        ("cpu:0", NONE),
    ],
)
def test_it_is_the_tensor_s_own(device: str, expected: Gpu) -> None:
    assert gpu_of(torch.device(device)) == expected


@pytest.mark.parametrize(
    ("what", "has_tma"), [("triton", False), ("descriptors", False), ("gluon", True)], ids=lambda what: str(what)
)
def test_kernels_need_a_triton_that_has_what_they_are_written_in(
    what: str, has_tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, f"missing_{what}", lambda: "there is none")
    assert gpu_of(torch.device("cuda", 1)) == Gpu("Hopper", 132, has_tma, has_gluon=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "meta"])
def test_no_gpu_is_needed_to_ask(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_of(torch.device(device)) == NONE
