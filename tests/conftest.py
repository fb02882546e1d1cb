"""What every test needs: caches of its own, and no memory of the test before."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.eager_inductor import EagerInductor

_own_cache = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before torch, Inductor and diffusers read it; processes that tests start inherit it."""
    if "ONLINEQUANT_TEST_CACHE" not in os.environ:
        config.stash[_own_cache] = os.environ["ONLINEQUANT_TEST_CACHE"] = tempfile.mkdtemp(prefix="onlinequant-tests-")
    # One Inductor cache for the whole run: many tests compile the same small graphs.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(os.environ["ONLINEQUANT_TEST_CACHE"]).resolve() / "inductor")
    # Every core runs a test, so a thread that spins while it waits for another one keeps that from running.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Inductor asks in each new cache whether the compiler knows this CPU's instructions, which takes ten seconds.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Without a GPU, Triton's kernels run in its interpreter. Triton reads this once, at its first import; torch would
    # know better whether there is a GPU, but is slow to ask.
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _own_cache in config.stash:
        shutil.rmtree(config.stash[_own_cache], ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache of ours before each test, and nothing left in the process after it."""
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", str(tmp_path / "onlinequant-cache"))
    monkeypatch.delenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", raising=False)
    # It takes seconds for each test, and another process does not see what a test has patched.
    if "onlinequant_backend.compilation.compile_process" in sys.modules:
        monkeypatch.setattr("onlinequant_backend.compilation.compile_process.is_possible", lambda: False)
    yield
    # Not imported here: most tests of plain Python never load torch.
    if "onlinequant_backend.best_effort" in sys.modules:
        sys.modules["onlinequant_backend.best_effort"].forget()
    if "onlinequant_backend" in sys.modules:
        sys.modules["onlinequant_backend"].reset()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(params=["interpreter", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test of a Triton kernel has its tensors: "cpu" (under Triton's interpreter) or "cuda"."""
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "interpreter":
        if not interpreted:
            pytest.skip("TRITON_INTERPRET=1 is not set: kernels run on the GPU")
        return "cpu"
    if interpreted:
        pytest.skip("TRITON_INTERPRET=1 is set: kernels run in Triton's interpreter")
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("torch sees no GPU")
    return "cuda"


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> EagerInductor:
    """Stands in for Inductor in one test."""
    from onlinequant_backend.torch_internals import inductor_interface
    from tests.helpers.eager_inductor import EagerInductor

    stand_in = EagerInductor()
    monkeypatch.setattr(inductor_interface, "compile_fx", stand_in)
    return stand_in


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this checkout."""
    from tests.helpers.checkout import build_sdist

    return build_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from ``sdist``."""
    from tests.helpers.checkout import build_wheel

    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))
