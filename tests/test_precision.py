from __future__ import annotations

import unittest.mock
from collections.abc import Callable

import pytest
import torch

from onlinequant_backend import compat, errors, precision
from onlinequant_backend.kernels import cpu
from onlinequant_backend.precision import Precision

CPU = torch.device("cpu")
SetFlags = Callable[..., None]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> SetFlags:
    """``has("avx_vnni", ...)``: this CPU has these instructions and no others, and oneDNN has its int8 kernels."""
    monkeypatch.setattr(precision, "_onednn_has_int8", lambda: True)

    def set_flags(*flags: str) -> None:
        names = ("avx512_vnni", "avx_vnni", "amx_int8", "avx2")
        monkeypatch.setattr(compat, "cpu_flags", lambda: {name: name in flags for name in names})

    return set_flags


@pytest.mark.parametrize("requested", ["auto", "int8"])
@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_fast_cpu_gets_8_bits(has: SetFlags, flag: str, requested: str) -> None:
    has("avx2", flag)
    resolved = precision.resolve(requested, CPU)
    assert (resolved.name, resolved.weight_bits) == ("int8", 8)
    assert resolved.reason == (f"this CPU has {flag}" if requested == "auto" else 'precision="int8" was asked for')


def test_cpu_without_vnni_is_left_alone_unless_asked(has: SetFlags) -> None:
    has("avx2")
    automatic = precision.resolve("auto", CPU)
    assert automatic.name == "float"
    assert "VNNI" in automatic.reason
    assert precision.resolve("int8", CPU) == Precision("int8", 'precision="int8" was asked for', 7)


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",)])
def test_float_is_float(has: SetFlags, flags: tuple[str, ...]) -> None:
    has(*flags)
    assert precision.resolve("float", CPU) == Precision("float", 'precision="float" was asked for')


@pytest.mark.parametrize(
    ("requested", "device"), [("fp8", "cpu"), ("fp8", "meta"), ("int8", "meta"), ("int8", "cuda"), ("fp8", "mps")]
)
def test_precision_that_is_not_there_is_an_error(has: SetFlags, requested: str, device: str) -> None:
    has("avx512_vnni")
    with pytest.raises(errors.PrecisionUnavailableError, match=f"precision='{requested}' has no kernels for {device}"):
        precision.resolve(requested, torch.device(device))


def test_other_devices_stay_in_float() -> None:
    assert precision.resolve("auto", torch.device("meta")) == Precision(
        "float", "there are no 8-bit kernels for meta yet"
    )


def test_torch_without_onednn_stays_in_float(has: SetFlags, monkeypatch: pytest.MonkeyPatch) -> None:
    has("avx512_vnni")
    monkeypatch.setattr(precision, "_onednn_has_int8", lambda: False)
    automatic = precision.resolve("auto", CPU)
    assert (automatic.name, automatic.reason) == ("float", "this torch has no oneDNN int8 kernels for this CPU")
    with pytest.raises(errors.PrecisionUnavailableError, match="no kernels for cpu"):
        precision.resolve("int8", CPU)


def test_this_machine_has_flags() -> None:
    flags = compat.cpu_flags()
    assert flags.keys() == {"avx512_vnni", "avx_vnni", "amx_int8", "avx2"}
    assert all(type(value) is bool for value in flags.values())


def test_kernels_ask_for_the_flags_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked at every call of every layer."""
    flags = unittest.mock.Mock(wraps=compat.cpu_flags)
    monkeypatch.setattr(compat, "cpu_flags", flags)
    cpu.has_vnni.cache_clear()
    answers = {cpu.has_vnni() for _ in range(3)}
    assert flags.call_count == len(answers) == 1
    # Kernels and calibration must agree: 8 bits of a weight saturate without VNNI.
    assert answers == {precision._cpu_weight_bits() == 8}
