from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

import onlinequant_backend
from onlinequant_backend import ops
from onlinequant_backend.cache.calibration_file import STATS_FILE
from onlinequant_backend.cli import commands, demo, doctor, kernel_check, system_check
from onlinequant_backend.kernels.formats import Format
from onlinequant_backend.kernels.nvidia import families
from onlinequant_backend.kernels.nvidia import provider as nvidia
from onlinequant_backend.kernels.nvidia.gpu import NONE
from onlinequant_backend.report import NodeDecision, Report
from onlinequant_backend.torch_internals import hardware


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    log = logging.getLogger("onlinequant")
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


def saved(path: Path, model: str) -> Path:
    layer = NodeDecision("conv_in", "conv", (1, 4, 8, 8), (8, 4, 3, 3), 9, 3, 3.0, None, None, None, False, "too small")
    Report(model, key="00", decisions=[layer]).save(path)
    return path


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("the kernel is broken\nsecond line")


def test_doctor_finds_that_8_bit_can_work_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", str(tmp_path))
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert commands.main(["doctor"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    for what in ("onlinequant", "torch", "triton", "CPU flags", "GPU", 'precision="auto" on cpu', "C++ compiler"):
        assert any(line.startswith(f"{what} ") for line in lines), what
    for family in ("oneDNN int8", "emulation"):
        assert any(line.split() == [*family.split(), "on", "cpu", "on"] for line in lines), family
    for kernel in ("quantize", "linear", "conv2d", "conv3d"):
        assert any(line.split() == ["kernel", kernel, "ok"] for line in lines), kernel
    assert "3.1 MB, can be written" in " ".join(out.split())
    assert lines[-1] == "8-bit quantization can work here."


def test_doctor_without_int8_says_why_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "onednn_has_int8", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert commands.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: precision='int8' has no kernels here: this torch has no oneDNN int8 kernels" in out
    assert any(
        re.match("oneDNN int8 on cpu +off: this torch has no oneDNN int8 kernels", line) for line in out.splitlines()
    )
    assert out.splitlines()[-1] == "8-bit quantization cannot work here."


@pytest.mark.parametrize(
    ("check", "message"),
    [(fail, "RuntimeError: the kernel is broken"), (lambda *_: 0.5, "relative error 0.5 against the reference")],
)
def test_doctor_reports_a_kernel_that_fails_or_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, check: Any, message: str
) -> None:
    monkeypatch.setattr(kernel_check, "CPU_CHECKS", {"linear": check})
    assert commands.main(["doctor"]) == 1
    assert f"problem: The kernel linear fails: {message}." in capsys.readouterr().out


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``gpu((9, 0))``: a GPU of this compute capability, which the CPU stands in for, with or without Triton."""

    def set_gpu(capability: tuple[int, int], triton: bool = True) -> None:
        spec = importlib.machinery.ModuleSpec("triton", None) if triton else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        stand_in = NONE._replace(has_tma=capability >= (9, 0))
        monkeypatch.setattr(nvidia, "gpu_of", lambda device: stand_in)
        monkeypatch.setattr(families, "missing_triton", lambda: None if triton else "Triton is not installed")
        monkeypatch.setattr(families, "missing_descriptors", lambda: None)
        monkeypatch.setattr(families, "missing_gluon", lambda: "Triton 3.9.0 has another Gluon: no tma.async_load")
        for name, check in kernel_check.GPU_CHECKS.items():

            def on_cpu(format: Format, device: torch.device, check: kernel_check.Check = check) -> float:
                assert device == torch.device("cuda", 0)
                return check(format, torch.device("cpu"))

            monkeypatch.setitem(kernel_check.GPU_CHECKS, name, on_cpu)

    return set_gpu


NEEDS_HOPPER = "off: needs compute capability 9.0"


@pytest.mark.parametrize(
    ("capability", "automatic", "tma", "gluon"),
    [
        ((8, 0), "int8", NEEDS_HOPPER, NEEDS_HOPPER),
        ((8, 9), "fp8", NEEDS_HOPPER, NEEDS_HOPPER),
        ((9, 0), "fp8", "on", "off: Triton 3.9.0 has another Gluon: no tma.async_load"),
        ((12, 0), "fp8", "on", "off: its instructions exist only on compute capability 9.0"),
    ],
)
def test_doctor_examines_a_gpu(
    capability: tuple[int, int], automatic: str, tma: str, gluon: str, gpu: Callable[..., None]
) -> None:
    gpu(capability)
    findings = doctor.examine()
    lines = dict(findings.lines)
    assert lines["GPU 0"].startswith("A GPU, compute capability ")
    assert lines['precision="auto" on cuda:0'] == f"{automatic}: this GPU has {automatic} matrix instructions"
    for family, state in (("TMA matmul", tma), ("Gluon convolutions", gluon), ("gather convolutions", "on")):
        assert lines[f"{family} on cuda:0"] == state
    for kernel in kernel_check.GPU_CHECKS:
        if kernel == "geglu" and tma != "on":
            assert f"kernel {kernel} on cuda:0" not in lines  # it would never be used
        else:
            assert lines[f"kernel {kernel} on cuda:0"].startswith("ok, relative error ")
    assert (findings.obstacles, findings.devices) == ([], ["cpu", "cuda:0"])
    assert doctor.render(findings).endswith("\n8-bit quantization can work here.")


def test_doctor_names_a_gpu_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., None]) -> None:
    gpu((9, 0))
    right = ops.geglu
    monkeypatch.setattr(ops, "geglu", lambda *operands: right(*operands) * 1.01)
    monkeypatch.setattr(ops, "group_norm", fail)
    findings = doctor.examine()
    lines = dict(findings.lines)
    assert lines["kernel conv2d on cuda:0"].startswith("ok")
    assert lines["kernel geglu on cuda:0"] == "relative error 0.01 against the reference"
    assert lines["kernel group_norm on cuda:0"] == "RuntimeError: the kernel is broken"
    (obstacle,) = findings.obstacles
    assert obstacle.startswith("Kernels fail on cuda:0 (geglu, group_norm). ")
    assert "driver" in obstacle and "pip install 'triton" in obstacle
    assert doctor.render(findings).endswith("\n8-bit quantization can work on cpu only.")


def test_doctor_misses_triton(gpu: Callable[..., None]) -> None:
    gpu((9, 0), triton=False)
    findings = doctor.examine()
    lines = dict(findings.lines)
    assert lines['precision="auto" on cuda:0'].startswith("float: Triton is not installed")
    assert lines["LayerNorm on cuda:0"] == lines["cuBLAS matmul on cuda:0"] == "off: Triton is not installed"
    (obstacle,) = findings.obstacles
    assert obstacle.startswith("No 8 bit on cuda:0: Triton is not installed") and "pip install 'triton" in obstacle
    assert findings.devices == ["cpu"]


def test_doctor_leaves_an_old_gpu_alone(gpu: Callable[..., None]) -> None:
    gpu((7, 5))
    findings = doctor.examine()
    lines = dict(findings.lines)
    assert "compute capability is 7.5" in lines['precision="auto" on cuda:0']
    assert lines["gather convolutions on cuda:0"] == "off: needs compute capability 8.0"
    assert not any(what.startswith("kernel") and "cuda" in what for what, _ in findings.lines)
    assert findings.works


def test_doctor_misses_the_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    assert system_check.compiler()[0] is not None
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert commands.main(["doctor"]) == 1
    assert "install g++ or clang++" in capsys.readouterr().out


def test_doctor_sees_a_cache_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert commands.main(["doctor"]) == 0  # quantizing works without a cache
    assert "cannot be written" in " ".join(capsys.readouterr().out.split())


def test_doctor_finds_a_cache_that_is_not_safe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert commands.main(["doctor", "--cache-dir", str(tmp_path)]) == 1  # a model would raise the same
    assert f"chmod 700 {tmp_path}" in capsys.readouterr().out


def test_doctor_folds_no_path(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / ("deep-" * 40)
    commands.main(["doctor", "--cache-dir", str(path)])
    assert f"cache directory          {path}, 0 B, can be written\n" in capsys.readouterr().out


def test_doctor_does_without_a_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["doctor", "--cache-dir", "~nobody-of-this-name/cache"]) == 0
    assert "set ONLINEQUANT_CACHE_DIR" in " ".join(capsys.readouterr().out.split())


def test_stats_prints_every_report_below_a_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved(tmp_path / "b" / STATS_FILE, "Second")
    saved(tmp_path / "a" / "deep" / STATS_FILE, "First")
    assert commands.main(["stats", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.index("First") < out.index("Second")
    assert out.count("too small") == 4  # a row and a summary each


def test_stats_takes_a_file_of_any_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert commands.main(["stats", str(saved(tmp_path / "renamed.json", "UNet"))]) == 0
    assert "UNet" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".", "absent"])
def test_stats_without_a_file_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    assert commands.main(["stats", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"There is no {STATS_FILE} below" in captured.err and "backend='onlinequant'" in captured.err


def test_stats_prints_the_others_beside_a_broken_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved(tmp_path / "b" / STATS_FILE, "Readable")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / STATS_FILE).write_text("{")
    assert commands.main(["stats", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "Readable" in captured.out and "If onlinequant wrote it, delete it" in captured.err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return (tmp_path / "stand-in").open("w").fileno()

    saved(tmp_path / STATS_FILE, "UNet")
    monkeypatch.setattr(commands.sys, "stdout", Stdout())
    assert commands.main(["stats", str(tmp_path)]) == 0


@pytest.mark.parametrize(("phase", "status"), [("quantized", 0), ("float", 1)])
def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: str, status: int) -> None:
    calls = []

    def run(output: Path, *, steps: int) -> Report:
        calls.append((output, steps))
        return Report("UNet", phase=phase)

    monkeypatch.setattr(demo, "run", run)
    assert commands.main(["demo", "--output", str(tmp_path), "--steps", "3"]) == status
    assert calls == [(tmp_path, 3)]


def test_demo_without_diffusers_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert commands.main(["demo", "--output", str(tmp_path)]) == 1
    assert "pip install 'onlinequant[demo]'" in capsys.readouterr().err


def test_demo_without_int8_says_so_before_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hardware, "onednn_has_int8", lambda: False)
    assert commands.main(["demo", "--output", str(tmp_path)]) == 1
    assert "no oneDNN int8 kernels" in capsys.readouterr().err


def test_demo_refuses_a_folder_that_it_cannot_make(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert commands.main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "Choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["demo", "--steps", "0"], "argument --steps: '0' is not an integer of at least 1"),
        (["demo", "--steps", "x"], "argument --steps: 'x' is not an integer of at least 1"),
        (["clear", "--older-than", "-1"], "argument --older-than: '-1' is not a number of at least 0"),
        (["clear", "--max-size", "nan"], "argument --max-size: 'nan' is not a number of at least 0"),
        (["clear", "--max-size", "much"], "argument --max-size: 'much' is not a number of at least 0"),
        (["export", "KEY"], "required: FILE"),
        (["import"], "required: FILE"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "usage: onlinequant" in printed and message in printed


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"onlinequant {onlinequant_backend.__version__}\n"


def test_the_log_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    commands._show_log()
    commands._show_log()
    logging.getLogger("onlinequant").info("observing 1 of 4")
    assert capsys.readouterr().err == "observing 1 of 4\n"
