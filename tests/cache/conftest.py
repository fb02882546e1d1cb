"""The cache's tests also run with Windows' rules for files, except those of modes, owners, links and forks."""

from __future__ import annotations

import pytest

from tests.helpers.windows import pretend_windows

_OF_FILES = ("test_atomic_files", "test_cache_store", "test_eviction", "test_locks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_of_files = metafunc.module.__name__.rpartition(".")[2] in _OF_FILES
    is_posix = metafunc.definition.get_closest_marker("posix") is not None
    if is_of_files:
        metafunc.parametrize("_system", ["posix"] if is_posix else ["posix", "windows"], indirect=True)


@pytest.fixture(autouse=True)
def _system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request, "param", "") == "windows":
        pretend_windows(monkeypatch)
