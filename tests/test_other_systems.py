"""Systems and GPUs that no test has at hand, pretended: Windows, macOS, Arm, AMD's and Intel's GPUs. Where there are no
8-bit kernels a model stays in float, with the reason, and nothing of CUDA is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor import cpp_builder, exc
from torch._subclasses import FakeTensorMode

import onlinequant_backend as oq
from onlinequant_backend import errors, operating_system
from onlinequant_backend.cli import commands, doctor, system_check
from onlinequant_backend.kernels import precision
from onlinequant_backend.torch_internals import batched_cpp, hardware
from tests.helpers.eager_inductor import EagerInductor

CPU = torch.device("cpu")
X86_ONLY = "the 8-bit kernels for CPUs are for x86, and this one is aarch64"


def layers(x: torch.Tensor, conv: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    return F.linear(F.conv2d(x, conv, padding=1), linear)


def compiled_on(device: torch.device, **options: Any) -> oq.Report:
    """The report of a graph with dense layers on a device that need not be there."""
    with FakeTensorMode():
        inputs = [torch.empty(size, device=device) for size in ((1, 320, 64, 64), (320, 320, 3, 3), (64, 64))]
    with torch.no_grad():
        oq.onlinequant(fx.symbolic_trace(layers), inputs, options=options)
    return oq.reports()[-1]


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for ROCm with an MI300, which torch calls "cuda" and whose capability would do for fp8."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("this is for NVIDIA's GPUs")

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    for name in ("CUDAGraph", "Event", "Stream", "get_device_properties", "get_allocator_backend", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, fail)


def test_rocm_is_not_taken_for_cuda(rocm: None, inductor: EagerInductor) -> None:
    report = compiled_on(torch.device("cuda", 0))
    assert (report.phase, report.precision) == ("float", "float")
    assert report.phase_reason == "there are no kernels for AMD GPUs yet" and report.phase_reason in report.summary()
    assert len(inductor.graphs) == 1 and inductor.quantized_ops() == 0
    for requested in ("int8", "fp8"):
        with pytest.raises(errors.PrecisionUnavailableError, match="no kernels for AMD GPUs yet"):
            compiled_on(torch.device("cuda", 0), precision=requested)


def test_doctor_tells_rocm(rocm: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert lines["GPU 0"].strip() == "AMD Instinct MI300X, through ROCm 6.4"
    assert lines['precision="auto" on cuda:0'].strip() == "float: there are no kernels for AMD GPUs yet"
    assert not {"NVIDIA driver", "problem"} & lines.keys() and "on cuda:0  ok" not in out and "triton=" not in out
    assert out.endswith("8-bit quantization can work on cpu only.\n")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_stay_in_float(
    kind: str, inductor: EagerInductor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = f"there are 8-bit kernels for NVIDIA GPUs and for x86 CPUs, and this is {kind}"
    report = compiled_on(torch.device(kind))
    assert (report.phase, report.phase_reason) == ("float", reason) and reason in report.summary()
    assert inductor.quantized_ops() == 0
    with pytest.raises(errors.PrecisionUnavailableError, match=reason):
        compiled_on(torch.device(kind), precision="int8")
    device = torch.device(kind)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    assert commands.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"float: {reason}" in out and "NVIDIA driver" not in out
    assert out.endswith("8-bit quantization can work on cpu only.\n")


@pytest.fixture(params=["aarch64", "arm64", "ARM64"])
def arm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of Arm's as Linux, macOS and Windows call it. Torch has oneDNN's int8 there as well, on Linux."""
    monkeypatch.setattr(operating_system.platform, "machine", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for ask in ("_is_vnni_supported", "_is_amx_tile_supported", "_is_avx2_supported"):
        monkeypatch.setattr(torch.cpu, ask, lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"}, raising=False)
    assert hardware.onednn_has_int8()


def test_arm_stays_in_float(arm: None, inductor: EagerInductor, capsys: pytest.CaptureFixture[str]) -> None:
    report = compiled_on(CPU)
    assert (report.phase, report.phase_reason) == ("float", X86_ONLY)
    assert inductor.quantized_ops() == 0
    with pytest.raises(errors.PrecisionUnavailableError, match=X86_ONLY):
        compiled_on(CPU, precision="int8")
    assert commands.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f'precision="auto" on cpu  float: {X86_ONLY}\n' in out
    assert out.endswith("8-bit quantization cannot work here.\n")


def test_arm_still_emulates_fp8(arm: None) -> None:
    assert precision.resolve("fp8", CPU).name == "fp8"


@pytest.mark.parametrize("name", ["x86_64", "AMD64", "amd64"])
def test_x86_has_one_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system.platform, "machine", lambda: name)
    assert operating_system.processor() == "x86_64"
    assert precision.resolve("int8", CPU).name == "int8"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system, "is_windows", lambda: True)


def no_compiler() -> str:
    raise exc.InvalidCxxCompiler("cl")


def other_language() -> str:
    raise RuntimeError("Torch.compile() is only support MSVC with English language pack")


@pytest.mark.parametrize(
    ("ask", "system", "remedy"),
    [
        (no_compiler, "is_windows", "x64 Native Tools Command Prompt"),
        (other_language, "is_windows", "English language pack"),
        (no_compiler, "is_mac", "run xcode-select --install"),
        (no_compiler, None, "install g++ or clang++"),
    ],
)
def test_doctor_names_the_compiler_of_the_system(
    ask: Callable[[], str],
    system: str | None,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", ask)
    if system is not None:
        monkeypatch.setattr(operating_system, system, lambda: True)
    assert commands.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert remedy in out and out.endswith("8-bit quantization cannot work here.\n")


def test_triton_has_another_name_on_windows(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "triton-windows":
            raise system_check.importlib.metadata.PackageNotFoundError(name)
        return "3.6.0.post25"

    monkeypatch.setattr(system_check.importlib.metadata, "version", version)
    assert system_check.triton_version() == "3.6.0.post25 (triton-windows)"
    assert doctor._triton_requirement() == "triton-windows"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton-windows" in precision.resolve("auto", torch.device("cuda")).reason


def test_doctor_measures_paths_on_windows(windows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep, usual = tmp_path / ("d" * 100), Path("C:/Users/somebody/AppData/Local/onlinequant/onlinequant/Cache")
    missing = len(str(deep)) + system_check._PATH_LENGTH - 259
    assert f"are {missing} longer: enable long paths" in doctor._describe_cache(str(deep))
    assert system_check.path_note(usual) == ""
    monkeypatch.setattr(operating_system, "_has_long_paths", lambda: True)
    assert system_check.path_note(deep) == ""


@pytest.mark.parametrize(("value", "are_enabled"), [(1, True), (0, False), (None, False)])
def test_long_paths_are_enabled_in_the_registry(
    value: int | None, are_enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Key:
        def __enter__(self) -> Key:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def query(key: Key, name: str) -> tuple[int, int]:
        if value is None:
            raise FileNotFoundError(name)
        return value, 4

    registry = SimpleNamespace(HKEY_LOCAL_MACHINE=1, OpenKey=lambda root, path: Key(), QueryValueEx=query)
    monkeypatch.setitem(sys.modules, "winreg", registry)
    assert operating_system._has_long_paths() is are_enabled


def test_arguments_are_quoted_for_the_systems_shell(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = r"C:\Users\Some Body\cache"
    assert operating_system.quoted(path) == f'"{path}"' and operating_system.quoted(r"C:\oq") == r"C:\oq"
    monkeypatch.setattr(operating_system, "is_windows", lambda: False)
    assert operating_system.quoted("/a b") == "'/a b'"


def test_kernels_of_windows_are_compiled_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor exports them there, in a form that has not been tried in batches."""
    body = "(const float* in_ptr0)\n{\n    in_ptr0;\n}\n"
    linux, windows = (
        f'{batched_cpp._INCLUDE}\nextern "C" {export} void  kernel{body}' for export in ("", "__declspec(dllexport)")
    )
    assert batched_cpp._KERNEL.fullmatch(linux) is not None and batched_cpp._KERNEL.fullmatch(windows) is None


def test_the_package_needs_nothing_that_windows_lacks() -> None:
    """It is imported, and lists its cache, where ``os`` lacks what it lacks on Windows."""
    code = """
import os, sys
# These ask for the real system.
import filelock, platformdirs.unix, psutil, rich.console, torch._dynamo, torch._inductor.compile_fx
for name in ("fork", "register_at_fork", "geteuid", "getuid", "nice", "sched_getaffinity"):
    delattr(os, name)
for name in ("fcntl", "grp", "pwd", "resource"):
    sys.modules[name] = None
from onlinequant_backend import backend, fork_locks, operating_system
from onlinequant_backend.cli import commands
operating_system.is_windows = lambda: True
assert operating_system.user_id() is None
sys.exit(commands.main(["stats", "--cache-dir", sys.argv[1]]))
"""
    result = subprocess.run([sys.executable, "-c", code, "absent-cache"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "") and "no calibration" in result.stdout


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", (6, 16)), ("4", (4 - 3 + 1, 4)), ("12", (6, 12)), ("64", (6, 16)), (None, (6, 16)), ("2", (0, 2))],
)
def test_the_memory_of_a_container_is_its_limit(
    limit: str | None, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = psutil.virtual_memory()._replace(available=6, total=16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    monkeypatch.setattr(operating_system, "_CGROUP", tmp_path)
    if limit is not None:
        for name, text in (("max", limit), ("current", "3"), ("stat", "anon 2\ninactive_file 1\nactive_file 7")):
            (tmp_path / f"memory.{name}").write_text(f"{text}\n", encoding="ascii")
    assert operating_system.free_memory() == expected
