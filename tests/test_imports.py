"""What starting costs: torch is imported by what computes, not by what reads files or answers for itself."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import onlinequant_backend as oq

# Each takes from half a second to several.
HEAVY = ("diffusers", "matplotlib", "sympy", "torch", "triton")


def heavy_imports(code: str, *arguments: str) -> list[str]:
    """Which heavy packages a process of its own has imported after ``code``, which finds ``arguments`` in sys.argv."""
    report = f"import sys; print('imported', *(name for name in {HEAVY!r} if name in sys.modules))"
    line = [sys.executable, "-c", f"try:\n    {code}\nfinally:\n    {report}", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    *_, (first, *imported) = map(str.split, done.stdout.splitlines())
    assert first == "imported", done
    assert "Traceback" not in done.stderr, done.stderr
    return imported


@pytest.mark.parametrize(
    "code",
    [
        "import onlinequant_backend",
        "from onlinequant_backend import OnlineQuantError, SamplingRun, sampling_run",
    ],
)
def test_imports_that_are_light(code: str) -> None:
    assert heavy_imports(code) == []


@pytest.mark.parametrize(
    "code",
    [
        "import onlinequant_backend.cache",
        "from onlinequant_backend.cache import atomic_files, cache_store, calibration_file, eviction, listing, locks",
        "from onlinequant_backend.cache import source_digest; source_digest.source_digest()",
        "from onlinequant_backend.cli import commands, transfer",
        "from onlinequant_backend import Report, reports, told_to; reports()",
    ],
)
def test_imports_without_torch(code: str) -> None:
    assert heavy_imports(code) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["unknown"],
        ["doctor", "--help"],
        ["demo", "--help"],
        ["stats", "--cache-dir", "."],
        ["clear", "--cache-dir", "."],
    ],
)
def test_commands_without_torch(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(oq.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    assert heavy_imports("from onlinequant_backend.cli import main; main()", *arguments) == []


def test_torch_is_seen_where_it_is_imported() -> None:
    assert "torch" in heavy_imports("from onlinequant_backend import onlinequant")


def test_public_names_are_those_that_are_documented() -> None:
    assert set(oq.__all__) <= set(dir(oq))
    assert set(oq._MODULES) < set(oq.__all__)
    for name in oq._MODULES:
        assert getattr(oq, name) is getattr(importlib.import_module(oq._MODULES[name], oq.__name__), name)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        oq.absent  # noqa: B018


_FROM_ALL_THREADS = """
import threading
import onlinequant_backend

errors, start = [], threading.Barrier(len(onlinequant_backend.__all__))

def touch(name):
    start.wait()
    try:
        getattr(onlinequant_backend, name)
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=touch, args=(name,)) for name in onlinequant_backend.__all__]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors)
"""


def test_threads_may_be_the_first_to_use_each_name() -> None:
    """Threads that import the same modules in different orders wait for each other, which Python ends with an error."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", _FROM_ALL_THREADS], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"
