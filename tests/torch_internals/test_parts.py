"""The private parts of torch that the package reads are in one table, and without one of them models stay in float."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onlinequant_backend.torch_internals import parts
from tests.helpers.private_names import private_names

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for top in ("onlinequant_backend", "passes", "comfy_integration")
    for path in sorted((ROOT / top).rglob("*.py"))
]
TABLE = {name.partition("(")[0] for need in parts.NEEDS for name in parts.names_of(need)}
REQUIRED = [need for need in parts.NEEDS if need.otherwise is None and not need.is_cuda]
# The helper cannot hide them: an attribute of every tensor, and what a config module looks its own attributes up in.
LEFT_OUT = ["torch.Tensor._version", "torch._dynamo.config._config"]


def is_in_table(name: str) -> bool:
    """Whether the table has ``name``, a value that has it, or something that it has."""
    in_config = re.sub(r"torch\.[\w.]*config\.(?=\w+$)", "torch.utils._config_module.ConfigModule.", name)
    if {name, in_config} & TABLE or any(entry.startswith(f"{name}.") for entry in TABLE):
        return True
    return any(name.startswith(f"{entry}.") for entry in TABLE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_table_has_every_private_name(path: Path) -> None:
    assert [name for name in sorted(private_names(path.read_text(encoding="utf-8"))) if not is_in_table(name)] == []


def test_private_names_are_found() -> None:
    source = """
import torch._a.b as c
from torch._d import e
from torch.f import _g, h
c.i; e.j.k; torch.l._m(); h._n; torch.fx.experimental.o.p; torch.q.r; own._s
"""
    assert private_names(source) == {
        *("torch._a.b", "torch._a.b.i", "torch._d.e", "torch._d.e.j.k", "torch.f._g", "torch.l._m", "torch.f.h._n"),
        "torch.fx.experimental.o.p",
    }
    assert not is_in_table("torch._dynamo.convert_frame.something_else") and not is_in_table("torch._new")


def test_this_torch_lacks_nothing_that_is_required() -> None:
    assert parts.why_float() is None


@pytest.mark.parametrize("need", REQUIRED, ids=lambda need: need.purpose)
def test_without_a_required_part_models_stay_in_float(need: parts.Need) -> None:
    names = [name for name in parts.names_of(need) if name not in LEFT_OUT]
    command = [sys.executable, "-m", "tests.helpers.torch_without", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found] == names
    for each in found:
        assert "error" not in each, each["error"]
        assert each["phase"] == "float" and each["is_equal"]
        assert each["name"] in each["reason"] and f"torch {torch.__version__} has no" in each["reason"]
        assert each["node"] == f"in float: {each['reason']}"
    assert done.stderr.count("Every model stays in float: torch ") == len(names), done.stderr
    assert "Traceback (most" not in done.stderr


def test_what_happens_without_an_optional_part_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_is_there", lambda name: "_LazyGraphModule" not in name)
    parts._absent.cache_clear()
    try:
        assert parts.why_float() is None
        assert parts.lacks(parts.LAZY_GRAPHS) and not parts.lacks(parts.KERNEL_BATCHES)
        assert parts.absences() == [
            f"torch {torch.__version__} has no torch.fx._lazy_graph_module._LazyGraphModule, which is needed for "
            "generating a graph's code only when it is called: it is generated at once"
        ]
    finally:
        monkeypatch.undo()
        parts._absent.cache_clear()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch._inductor.codecache.LambdaFuture", True),
        ("torch._inductor.codecache.NoSuchFuture", False),
        ("torch._inductor.list_mode_options", True),
        ("torch._inductor.no_such_module.thing", False),
    ],
)
def test_modules_that_are_not_loaded_are_searched(name: str, expected: bool) -> None:
    assert parts._is_in_source(name, "") == expected
    assert parts._is_there(name) == expected


def test_looking_for_the_parts_takes_little_and_imports_no_compiler() -> None:
    code = """
import sys, time, torch, torch._dynamo
from onlinequant_backend.torch_internals import parts
started = time.process_time()
parts.why_float()
print(time.process_time() - started, "torch._inductor.compile_fx" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, has_compiler = done.stdout.split()
    assert float(seconds) < 0.3 and has_compiler == "False"
