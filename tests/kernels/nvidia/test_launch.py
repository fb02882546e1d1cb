"""How kernels are launched."""

from __future__ import annotations

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
        return grid


def _add(x, y):  # type: ignore[no-untyped-def]
    return x + y


def _twice(x):  # type: ignore[no-untyped-def]
    return add(x, x)


def _kernel(x):  # type: ignore[no-untyped-def]
    twice(x).twice()


add, twice, kernel = _Function(_add), _Function(_twice), _Function(_kernel)


def test_called_functions_have_keys_before_their_callers() -> None:
    """Else Triton 3.6 makes other keys in another process, which then compiles again what is in the cache."""
    assert launch.launch(kernel, 3) == (3,)  # the grid, which ``__getitem__`` gives back
    first_asked = list(dict.fromkeys(asked))
    assert first_asked == ["_add", "_twice", "_kernel"]
    asked.clear()
    launch.launch(kernel, 3)
    assert asked == []
