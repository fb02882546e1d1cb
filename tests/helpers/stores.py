"""A cache of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinequant_backend.cache.cache_store import Cache


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path.resolve() / "cache"


@pytest.fixture
def store(root: Path) -> Cache:
    return Cache.open(str(root))
