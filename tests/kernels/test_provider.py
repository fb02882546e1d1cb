"""What is known of devices, and that every provider answers it for every op and format."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.graph.conv_geometry import ConvGeometry
from onlinequant_backend.kernels import Operands, provider_of, reference
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, ONEDNN_7, Format
from onlinequant_backend.kernels.nvidia import gpu
from onlinequant_backend.kernels.nvidia import provider as nvidia
from onlinequant_backend.kernels.provider import PROVIDERS, providers_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FUSED = ("geglu", "layer_norm", "group_norm", "channel_add")


@pytest.mark.parametrize(
    ("format", "device", "expected"),
    [
        (ONEDNN, CPU, "X86"),
        (ONEDNN_7, CPU, "X86"),
        (INT8, CPU, "Emulated"),
        (FP8, CPU, "Emulated"),
        (INT8, CUDA, "Nvidia"),
        (FP8, CUDA, "Nvidia"),
        (ONEDNN, CUDA, "Nvidia"),  # which a graph in float has
        (ONEDNN, torch.device("mps"), "X86"),
    ],
)
def test_who_computes(format: Format, device: torch.device, expected: str) -> None:
    assert type(provider_of(format, device)).__name__ == expected


def test_amd_gpus_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(provider).__name__ for provider in providers_for(CUDA)] == ["Nvidia"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert providers_for(CUDA) == ()


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: type(provider).__name__)
def test_there_is_a_kernel_for_each_op(provider: object) -> None:
    names = {schema.split("::")[1] for schema in torch._C._dispatch_get_all_op_names() if "onlinequant::" in schema}
    assert names >= {"linear", "conv", "geglu", "layer_norm", "group_norm"}
    for name in names - {"quantize"}:  # which is made of torch's own
        assert callable(ops.as_op(name, provider.kernels))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("format", "device", "fuses"),
    [(ONEDNN, CPU, False), (INT8, CPU, True), (FP8, CPU, True), (INT8, CUDA, True), (ONEDNN, CUDA, False)],
)
@pytest.mark.parametrize("op", FUSED)
def test_what_is_fused(op: str, format: Format, device: torch.device, fuses: bool) -> None:
    reason = provider_of(format, device).lacks(op, format, device)
    assert reason is None if fuses else reason


def test_geglu_is_asked_of_the_gpu_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [gpu.NONE, gpu.NONE._replace(has_tma=True)]
    monkeypatch.setattr(nvidia, "gpu_of", lambda device: gpus[device.index])
    answers = [
        provider_of(FP8, CUDA).lacks("geglu", FP8, torch.device("cuda", index), (640, inputs))
        for index, inputs in ((0, 320), (1, 320), (1, 20))
    ]
    assert answers == ["no kernel has 320 inputs on this GPU", None, "no kernel has 20 inputs on this GPU"]


@pytest.mark.parametrize("format", [ONEDNN, INT8, FP8], ids=lambda format: format.name)
@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 3, 3), (8, 16, 3, 1, 1)])
def test_what_is_packed_is_what_is_read(shape: tuple[int, ...], format: Format) -> None:
    provider = provider_of(format, CPU)
    q = torch.randint(-5, 5, shape).to(format.weight)
    weight = provider.new_weight(q.shape, format, CPU)
    geometry = None if len(shape) == 2 else ConvGeometry(*[(1,) * (len(shape) - 2)] * 3)
    provider.pack(weight, q, geometry)
    assert (weight.untyped_storage().nbytes() == 1) == format.is_packed
    qparams = torch.tensor([9.0, 0, 1 / 9])
    xq = ops.quantize(torch.rand(4, 16, *(5 for _ in shape[2:])), qparams, format.activation, False)
    given = Operands(xq, qparams, q, torch.ones(8), None)
    stored = given._replace(weight=weight)
    if geometry is None:
        result, expected = ops.linear(*stored, torch.float32), reference.linear(given, torch.float32)
    else:
        result = ops.conv(*stored, *geometry, torch.float32)
        expected = reference.conv(given, geometry, torch.float32)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_triton_kernels_are_imported_by_the_first_call() -> None:
    script = """
import sys, onlinequant_backend.kernels
print([name for name in ("matmul", "conv", "gather", "gluon_conv", "launch", "epilogue", "snapshot")
       if f"onlinequant_backend.kernels.nvidia.{name}" in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert run.stdout.strip() == "[]"
