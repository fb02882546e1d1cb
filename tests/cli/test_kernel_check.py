from __future__ import annotations

from typing import Any

import pytest
import torch

from onlinequant_backend import ops
from onlinequant_backend.cli import kernel_check
from onlinequant_backend.kernels import precision
from onlinequant_backend.kernels.formats import FP8, INT8, Format
from onlinequant_backend.kernels.nvidia import gpu, operators
from tests.helpers.graph_probe import host_precision

CPU = torch.device("cpu")
HOST = host_precision().format


@pytest.mark.parametrize(
    ("format", "check"),
    [pytest.param(HOST, check, id=f"{HOST.name}-{name}") for name, check in kernel_check.CPU_CHECKS.items()]
    + [
        pytest.param(format, check, id=f"{format.name}-{name}")
        for format in (INT8, FP8)
        for name, check in kernel_check.GPU_CHECKS.items()
    ],
)
def test_right_kernels_pass(format: Format, check: kernel_check.Check) -> None:
    assert kernel_check.outcome(check, format, CPU).passed


@pytest.mark.parametrize("tma", [True, False])
def test_kernels_of_gpus_pass(tma: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    format = INT8  # Triton's interpreter (3.8) rounds to fp8 wrongly
    if device == "cuda":
        if tma != gpu.gpu_of(torch.device(device)).has_tma:
            pytest.skip("this GPU has other kernels")
        format = precision.resolve("auto", torch.device(device)).format
    else:
        monkeypatch.setattr(operators, "gpu_of", lambda _device: gpu.NONE._replace(has_tma=tma))
        for name in ("linear", "geglu", "layer_norm", "group_norm", "conv"):
            monkeypatch.setattr(ops, name, ops.as_op(name, operators))
    outcomes = {
        name: kernel_check.outcome(check, format, torch.device(device))
        for name, check in kernel_check.GPU_CHECKS.items()
        if tma or name != "geglu"
    }
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.passed} == {}


def corrupted(result: Any) -> Any:
    """A result with a mistake: all of it a hundredth too large, or 8-bit numbers in the wrong columns."""
    if isinstance(result, tuple):
        return result[0], corrupted(result[1])
    return result.roll(1, 1) if result.element_size() == 1 else result * 1.01


@pytest.mark.parametrize("format", [INT8, FP8], ids=lambda format: format.name)
@pytest.mark.parametrize("op", ["linear", "conv", "geglu", "layer_norm", "group_norm"])
def test_wrong_kernel_does_not_pass(op: str, format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *operands: corrupted(right(*operands)))
    for name, check in kernel_check.GPU_CHECKS.items():
        assert kernel_check.outcome(check, format, CPU).passed == (not name.startswith(op)), name


def test_nan_does_not_pass() -> None:
    assert kernel_check.outcome(lambda *_: float("nan"), FP8, CPU) == (
        False,
        "relative error nan against the reference",
    )
