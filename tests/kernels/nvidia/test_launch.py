"""How kernels are launched."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
from onlinequant_backend.kernels.nvidia import launch  # noqa: E402

asked: list[str] = []


class _Function(triton.JITFunction):  # type: ignore[misc]
    """Notes when its key is asked for."""

    @property
    def cache_key(self) -> str:
        asked.append(self.fn.__name__)
        return str(super().cache_key)

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(dict, grid=grid)


def _add(x, y):  # type: ignore[no-untyped-def]
    return x + y


def _twice(x):  # type: ignore[no-untyped-def]
    return add(x, x)


def _kernel(x):  # type: ignore[no-untyped-def]
    twice(x).twice()


add, twice, kernel = _Function(_add), _Function(_twice), _Function(_kernel)


@pytest.fixture(autouse=True)
def _fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch.FUSES_PRODUCTS_AND_SUMS, "_kernel", True)


def test_called_functions_have_keys_before_their_callers() -> None:
    """Else Triton 3.6 makes other keys in another process, which then compiles again what is in the cache."""
    launch.launch(kernel, 3)
    first_asked = list(dict.fromkeys(asked))
    assert first_asked == ["_add", "_twice", "_kernel"]
    asked.clear()
    launch.launch(kernel, 3)
    assert asked == []


@pytest.mark.parametrize("is_fused", [True, False])
def test_triton_is_told_whether_to_fuse(is_fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default depends on the version."""
    monkeypatch.setitem(launch.FUSES_PRODUCTS_AND_SUMS, "_kernel", is_fused)
    assert launch.launch(kernel, 3)(x=1) == {"grid": (3,), "x": 1, "enable_fp_fusion": is_fused}
    compiled = []
    monkeypatch.setattr(launch.precompile, "is_ahead", lambda: True)
    monkeypatch.setattr(launch, "_compile", lambda *args, **options: compiled.append((args, options)))
    launch.launch(kernel, 3)("x", num_warps=4)
    assert compiled == [((kernel, (3,), "x"), {"num_warps": 4, "enable_fp_fusion": is_fused})]


def test_each_kernel_says_whether_to_fuse() -> None:
    package = importlib.import_module(launch.__package__)
    kernels = set()
    for module in pkgutil.iter_modules(package.__path__):
        try:
            names = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        except ImportError:  # this Triton has no Gluon
            kernels.add("_gluon_conv_kernel")
            continue
        kernels.update(name for name, value in names.items() if name.endswith("_kernel") and hasattr(value, "fn"))
    assert kernels == launch.FUSES_PRODUCTS_AND_SUMS.keys() - {"_kernel"}
