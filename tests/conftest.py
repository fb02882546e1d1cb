"""What every test needs: caches of its own, and no memory of the test before."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_own_cache = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before torch, Inductor and diffusers read it; processes that tests start inherit it."""
    if "ONLINEQUANT_TEST_CACHE" not in os.environ:
        config.stash[_own_cache] = os.environ["ONLINEQUANT_TEST_CACHE"] = tempfile.mkdtemp(prefix="onlinequant-tests-")
    # One Inductor cache for the whole run: many tests compile the same small graphs.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(os.environ["ONLINEQUANT_TEST_CACHE"]).resolve() / "inductor")
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    if _own_cache in config.stash:
        shutil.rmtree(config.stash[_own_cache], ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache of ours before each test, and nothing left in the process after it."""
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", str(tmp_path / "onlinequant-cache"))
    monkeypatch.delenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", raising=False)
    yield
    # Not imported here: most tests of plain Python never load torch.
    if "onlinequant_backend" in sys.modules:
        sys.modules["onlinequant_backend"].reset()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
