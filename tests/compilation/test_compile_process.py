"""The process that compiles beforehand, a real one: what it leaves is found here, and nothing waits for it."""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import operating_system
from onlinequant_backend.compilation import compile_process, graph_transport
from onlinequant_backend.compilation.compile_process import (
    CompileProcess,
    CompileProcessError,
    WorkFailedError,
    done_elsewhere,
    is_possible,
)
from onlinequant_backend.torch_internals import inductor_interface, torch_settings
from tests.helpers.eager_inductor import EagerInductor
from tests.helpers.model_process import ModelProcess
from tests.helpers.small import CLOSE, WIDE, X, compiled, small
from tests.helpers.threads import join_background
from tests.helpers.tiny import relative_error

ASIDE = {"compile_in_background": True}
Modes = Callable[[], contextlib.AbstractContextManager[Any]]


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileProcess]:
    """The process that background compiles use, which is not there yet; the caches lie where a user has them."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(compile_process, "is_possible", lambda: True)
    own = CompileProcess()
    monkeypatch.setattr(compile_process, "_process", own)
    yield own
    join_background()
    own.stop()


@pytest.fixture(scope="module")
def idle() -> Iterator[CompileProcess]:
    """One that several tests share."""
    shared = CompileProcess()
    yield shared
    shared.stop()


def pid(process: CompileProcess) -> int:
    return int(process.run(os.getpid))


def until_it_is_compiled(model: nn.Module, step: Callable[..., torch.Tensor], x: torch.Tensor, mode: Modes) -> int:
    """Call it all the time, here and in another thread, until no compile goes on; how many of the calls were in float.

    Each gives what the float model gives, or what 8 bit may make of it."""
    is_over, in_float = threading.Event(), list[bool]()
    expected = model(x)

    def call() -> None:
        picture = step(x)
        in_float.append(torch.equal(picture, expected))
        assert in_float[-1] or relative_error(picture, expected) < CLOSE
        time.sleep(0.01)  # leave a processor to those who compile

    def beside() -> None:
        with mode():
            while not is_over.is_set():
                call()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(beside)
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not other.done() and _is_to_come():
                call()
        finally:
            is_over.set()
        other.result(60)
    join_background()
    step(x)  # the first of a size looks for drift, and may be in float
    assert 0 < relative_error(step(x), expected) < CLOSE
    return sum(in_float)


def _is_to_come() -> bool:
    report = oq.reports()[-1]
    return report.phase in ("calibrating", "compiling")


def graphs_traced() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_what_it_compiles_is_found(process: CompileProcess) -> None:
    """For the first size, and for all others; in ``inference_mode``, as ComfyUI is."""
    torch._dynamo.utils.counters.clear()
    model = small()
    step = compiled(model, ASIDE)
    with torch.inference_mode():
        for graphs, x in enumerate((X, WIDE), start=1):
            step(x)
            in_float = until_it_is_compiled(model, step, x, torch.inference_mode)
            assert in_float > 20  # it did not wait
            assert (inductor_interface.found_graphs(), graphs_traced()) == ((graphs, 0), graphs)
            assert oq.reports()[-1].phase == "quantized"


@pytest.mark.slow
def test_after_a_restart_the_first_call_is_in_8_bit(tmp_path: Path) -> None:
    """Also for another size, for which Dynamo traces first."""
    sizes = (tuple(X.shape), tuple(WIDE.shape))
    # Without drift checks: those of the second size move ranges, and then pictures are not the same to the last bit.
    options: dict[str, Any] = {"model": "small", "inductor": True, "drift_check_every": 0, **ASIDE}
    with ModelProcess(tmp_path / "cache", **options) as first:
        for size in sizes:
            while (answer := first.ask("call", *size))["phase"] != "quantized":
                time.sleep(0.1)
        made = [first.ask("call", *size) for size in sizes]
    with ModelProcess(tmp_path / "cache", new_interpreter=True, **options) as second:
        for hits, (size, known) in enumerate(zip(sizes, made, strict=True), start=1):
            answer = second.ask("call", *size)
            assert (answer["phase"], answer["calls_observed"]) == ("quantized", 0)
            assert answer["picture"] == known["picture"]
            caches = answer["caches"]
            assert caches["autograd_cache_hit"] == caches["fxgraph_cache_hit"] == hits
            assert not {"autograd_cache_miss", "fxgraph_cache_miss", "fxgraph_cache_bypass"} & caches.keys()
    assert not first.warnings and not second.warnings


@pytest.mark.slow
@torch.no_grad()
def test_without_it_nothing_fails_meanwhile(process: CompileProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then FX traces here, and says so to all threads."""
    monkeypatch.setattr(compile_process, "is_possible", lambda: False)
    other, model = small(1), small()
    plain, step = torch.compile(other), compiled(model, ASIDE)
    expected, is_over = other(X), threading.Event()

    def call_another() -> int:
        calls = 0
        with torch.no_grad():
            while not is_over.is_set():
                assert relative_error(plain(X), expected) < 1e-5
                calls += 1
                time.sleep(0.001)
        return calls

    plain(X)
    torch._dynamo.utils.counters.clear()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(call_another)
        try:
            step(X)
            assert until_it_is_compiled(model, step, X, torch.no_grad) > 20
        finally:
            is_over.set()
        assert beside.result(60) > 20
    assert (inductor_interface.found_graphs(), graphs_traced()) == ((0, 1), 1)
    assert process._process is None and oq.reports()[-1].phase == "quantized"
    assert torch._dynamo.config.error_on_nested_fx_trace


@torch.no_grad()
def test_what_it_cannot_do_is_done_here(
    process: CompileProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "onlinequant")
    inductor = EagerInductor()
    monkeypatch.setattr(inductor_interface, "compile_fx", inductor)
    monkeypatch.setattr(graph_transport, "dumps", lambda _value: b"no graph")
    quantize()
    assert len(inductor.graphs) == 1
    (message,) = (message for message in caplog.messages if "this process tries what" in message)
    assert "UnpicklingError" in message and "compile_packed" in message  # with the traceback
    assert process.run(abs, -1) == 1


@torch.no_grad()
def test_one_that_is_killed_in_the_middle(
    process: CompileProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "onlinequant")
    inductor, killed = EagerInductor(), list[int]()
    monkeypatch.setattr(inductor_interface, "compile_fx", inductor)

    def send_and_kill(stream: Any, message: bytes) -> None:
        send(stream, message)
        killed.append(process._process.pid if process._process else 0)
        process.stop()

    send = compile_process.send
    with monkeypatch.context() as patch:
        patch.setattr(compile_process, "send", send_and_kill)
        quantize()
        join_background()
    assert len(inductor.graphs) == 1 and "without an answer" in caplog.text
    assert len(set(killed)) == 2  # the second one, since the first may have ended with nothing to do
    assert pid(process) not in killed


def quantize() -> None:
    """Have a model compiled in the background."""
    model = small()
    step = compiled(model, ASIDE)
    for _ in range(3):
        assert torch.equal(step(X), model(X))
    join_background()
    assert 0 < relative_error(step(X), model(X)) < CLOSE


def test_it_is_asked_by_background_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_process, "is_possible", lambda: True)
    monkeypatch.setattr(CompileProcess, "run", lambda _process, function, *args, idle: function(*args))
    done = list[int]()
    assert not done_elsewhere(done.append, 1)
    with compile_process.in_background():
        assert done_elsewhere(done.append, 2)
    assert not done_elsewhere(done.append, 3)
    assert done == [2]


@pytest.mark.parametrize(
    ("executable", "is_python"),
    [("/usr/bin/python3.12", True), ("C:/Comfy/Python.exe", True), ("/usr/bin/blender", False), ("", False)],
)
def test_a_program_that_has_python_built_in(executable: str, is_python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert is_possible() == is_python


def test_an_embedded_python_finds_what_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ComfyUI's portable version for Windows has it: it reads neither PYTHONPATH nor the current directory."""
    python = tmp_path / "python-embedded"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n', encoding="utf-8")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    process = CompileProcess()
    try:
        assert process.run(os.getpid) != os.getpid()
        assert process.run(importlib.import_module("onlinequant_backend.config").QuantConfig).mode is None
    finally:
        process.stop()


def test_what_it_starts_does_not_share_its_messages(idle: CompileProcess) -> None:
    """On Windows a compiler would wait for the next message before it starts; anywhere it could read one."""
    command = [sys.executable, "-c", "import sys; sys.exit(len(sys.stdin.read()))"]
    assert idle.run(subprocess.call, command) == 0


def test_on_windows_it_opens_no_window_and_has_a_low_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system, "is_windows", lambda: True)
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    monkeypatch.setattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0x4000, raising=False)
    assert operating_system.background_process() == {"creationflags": 0x08004000}
    monkeypatch.delattr(os, "nice")
    operating_system.be_nice()


def test_it_stays_for_what_comes_next_whatever_happens(idle: CompileProcess) -> None:
    first = pid(idle)
    with pytest.raises(WorkFailedError, match="ZeroDivisionError"):
        idle.run(operator.truediv, 1, 0)
    with pytest.raises(CompileProcessError, match="cannot pickle"):
        idle.run(threading.Lock)
    with pytest.raises(CompileProcessError, match="local object"):  # pickle's message since Python 3.13 lacks its name
        idle.run(lambda: 1)
    assert idle.run(os.system, "echo on standard output") == 0
    idle.run(print, "printed")
    assert pid(idle) == first != os.getpid()


def test_one_that_has_ended_is_replaced(idle: CompileProcess) -> None:
    first = pid(idle)
    os.kill(first, signal.SIGKILL)  # not waited for: its pipes are closed before it is gone
    assert pid(idle) != first


def test_settings_reach_it(idle: CompileProcess) -> None:
    """The keys of Inductor's caches hold them."""
    before = torch_settings.settings()
    assert idle.run(torch_settings.settings) == before
    with changed_settings():
        changed = torch_settings.settings()
        assert idle.run(torch_settings.settings) == changed
    assert changed != before and all(there != here for there, here in zip(changed, before, strict=True))
    assert idle.run(torch_settings.settings) == torch_settings.settings() != changed  # what differs no more is set back


@contextlib.contextmanager
def changed_settings() -> Iterator[None]:
    """Some of each kind."""
    import torch._inductor.config as inductor_config

    threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul
    matmul.allow_tf32 = not matmul.allow_tf32
    torch.set_num_threads(threads + 1)
    torch.use_deterministic_algorithms(True)
    try:
        with inductor_config.patch({"max_fusion_size": 7, "cpp.simdlen": 256}):
            yield
    finally:
        matmul.allow_tf32 = not matmul.allow_tf32
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


_PARENT = """
import os, time
from onlinequant_backend.compilation.compile_process import CompileProcess
process = CompileProcess()
print(process.run(os.getpid), flush=True)
process.run(time.sleep, 600)
"""


def test_it_ends_with_the_process_that_started_it() -> None:
    """In the middle of its work, and however that one ends."""
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    deadline = time.monotonic() + 20
    while is_alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_ends_where_there_is_nothing_to_do() -> None:
    code = (
        "from onlinequant_backend.compilation import compile_worker; compile_worker.IDLE = 0.1; compile_worker.main()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as worker:
        assert worker.stdout is not None
        assert (worker.wait(60), worker.stdout.read()) == (0, b"")


def test_after_work_it_waits_as_long_as_it_is_told() -> None:
    process = CompileProcess()
    first = process.run(os.getpid)
    assert process.run(os.getpid, idle=0.0) == first
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(first).wait(20)
    assert process.run(os.getpid) != first
    process.stop()
