from __future__ import annotations

import importlib.machinery
import importlib.util
import unittest.mock
from collections.abc import Callable

import pytest
import torch

from onlinequant_backend import errors
from onlinequant_backend.kernels import cpu_providers, precision, x86
from onlinequant_backend.kernels.formats import FP8, INT8, ONEDNN, ONEDNN_7, Format
from onlinequant_backend.kernels.precision import Precision
from onlinequant_backend.torch_internals import hardware

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SetFlags = Callable[..., None]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> SetFlags:
    """``has("avx_vnni", ...)``: this CPU has these instructions and no others, and oneDNN has its int8 kernels."""
    monkeypatch.setattr(hardware, "onednn_has_int8", lambda: True)

    def set_flags(*flags: str) -> None:
        names = ("avx512_vnni", "avx_vnni", "amx_int8", "avx2")
        monkeypatch.setattr(hardware, "cpu_flags", lambda: {name: name in flags for name in names})

    return set_flags


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``gpu((8, 9))``: a GPU of this compute capability, with or without Triton."""
    find_spec = importlib.util.find_spec

    def set_gpu(capability: tuple[int, int], triton: bool = True) -> None:
        def find(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
            if name == "triton":
                return importlib.machinery.ModuleSpec("triton", None) if triton else None
            return find_spec(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return set_gpu


@pytest.mark.parametrize("requested", ["auto", "int8"])
@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8"])
def test_fast_cpu_gets_8_bits(has: SetFlags, flag: str, requested: str) -> None:
    has("avx2", flag)
    resolved = precision.resolve(requested, CPU)
    assert (resolved.name, resolved.format) == ("int8", ONEDNN)
    assert resolved.reason == (f"this CPU has {flag}" if requested == "auto" else 'precision="int8" was asked for')


def test_cpu_without_vnni_is_left_alone_unless_asked(has: SetFlags) -> None:
    has("avx2")
    automatic = precision.resolve("auto", CPU)
    assert automatic.name == "float"
    assert "VNNI" in automatic.reason
    assert precision.resolve("int8", CPU) == Precision("int8", 'precision="int8" was asked for', ONEDNN_7)


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",)])
def test_float_is_float(has: SetFlags, flags: tuple[str, ...]) -> None:
    has(*flags)
    assert precision.resolve("float", CPU) == Precision("float", 'precision="float" was asked for')


@pytest.mark.parametrize(("requested", "device"), [("fp8", "meta"), ("int8", "meta"), ("int8", "mps"), ("fp8", "mps")])
def test_precision_that_is_not_there_is_an_error(has: SetFlags, requested: str, device: str) -> None:
    has("avx512_vnni")
    with pytest.raises(errors.PrecisionUnavailableError, match=f"precision='{requested}' .*, and this is {device}"):
        precision.resolve(requested, torch.device(device))


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",)])
def test_fp8_on_a_cpu_is_emulated_if_asked_for(has: SetFlags, flags: tuple[str, ...]) -> None:
    has(*flags)
    assert precision.resolve("fp8", CPU) == Precision("fp8", 'precision="fp8" was asked for', FP8)


@pytest.mark.parametrize(
    ("capability", "automatic", "possible"),
    [
        ((7, 0), "float", ()),
        ((8, 0), "int8", ("int8",)),
        ((8, 6), "int8", ("int8",)),
        ((8, 9), "fp8", ("int8", "fp8")),
        ((9, 0), "fp8", ("int8", "fp8")),
        ((12, 0), "fp8", ("int8", "fp8")),
    ],
    ids=["Volta", "Ampere (A100)", "Ampere (RTX 30)", "Ada", "Hopper", "Blackwell"],
)
def test_what_a_gpu_can_do(
    gpu: Callable[..., None], capability: tuple[int, int], automatic: str, possible: tuple[str, ...]
) -> None:
    gpu(capability)
    formats: dict[str, Format] = {"int8": INT8, "fp8": FP8}
    resolved = precision.resolve("auto", CUDA)
    assert resolved.name == automatic
    if automatic == "float":
        assert resolved.reason == "this GPU's compute capability is 7.0, and int8 needs 8.0"
    else:
        assert resolved == Precision(automatic, f"this GPU has {automatic} matrix instructions", formats[automatic])
    for requested, format in formats.items():
        if requested in possible:
            asked = precision.resolve(requested, CUDA)
            assert asked == Precision(requested, f'precision="{requested}" was asked for', format)
        else:
            have, need = ".".join(map(str, capability)), "8.9" if requested == "fp8" else "8.0"
            with pytest.raises(errors.PrecisionUnavailableError, match=f"is {have}, and {requested} needs {need}"):
                precision.resolve(requested, CUDA)
    assert precision.resolve("float", CUDA).name == "float"


def test_a_gpu_without_triton_stays_in_float(gpu: Callable[..., None]) -> None:
    gpu((9, 0), triton=False)
    automatic = precision.resolve("auto", CUDA)
    assert automatic.name == "float"
    assert "Triton is not installed" in automatic.reason
    for requested in ("int8", "fp8"):
        with pytest.raises(errors.PrecisionUnavailableError, match=f"'{requested}' .*Triton is not installed"):
            precision.resolve(requested, CUDA)


def test_the_gpu_asked_about_is_the_one_that_is_meant(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    capabilities = {torch.device("cuda", 0): (9, 0), torch.device("cuda", 1): (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert [precision.resolve("auto", device).name for device in capabilities] == ["fp8", "int8"]


def test_other_devices_stay_in_float() -> None:
    reason = "there are 8-bit kernels for NVIDIA GPUs and for x86 CPUs, and this is meta"
    assert precision.resolve("auto", torch.device("meta")) == Precision("float", reason)


def test_amd_gpus_stay_in_float(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch calls them "cuda" as well, and tells capabilities of 9.0 and more."""
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert precision.resolve("auto", CUDA) == Precision("float", "there are no kernels for AMD GPUs yet")
    for requested in ("int8", "fp8"):
        with pytest.raises(errors.PrecisionUnavailableError, match="no kernels for AMD GPUs yet"):
            precision.resolve(requested, CUDA)


def test_torch_without_onednn_stays_in_float(has: SetFlags, monkeypatch: pytest.MonkeyPatch) -> None:
    has("avx512_vnni")
    monkeypatch.setattr(hardware, "onednn_has_int8", lambda: False)
    automatic = precision.resolve("auto", CPU)
    assert (automatic.name, automatic.reason) == ("float", "this torch has no oneDNN int8 kernels for this CPU")
    with pytest.raises(errors.PrecisionUnavailableError, match="no oneDNN int8 kernels"):
        precision.resolve("int8", CPU)


def test_this_machine_has_flags() -> None:
    flags = hardware.cpu_flags()
    assert flags.keys() == {"avx512_vnni", "avx_vnni", "amx_int8", "avx2"}
    assert all(type(value) is bool for value in flags.values())


def test_kernels_ask_for_the_flags_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked at every call of every layer."""
    flags = unittest.mock.Mock(wraps=hardware.cpu_flags)
    monkeypatch.setattr(hardware, "cpu_flags", flags)
    x86.has_vnni.cache_clear()
    answers = {x86.has_vnni() for _ in range(3)}
    assert flags.call_count == len(answers) == 1
    # Kernels and calibration must agree: 8 bits of a weight saturate without VNNI.
    assert answers == {cpu_providers.X86().format("int8", CPU) == ONEDNN}
