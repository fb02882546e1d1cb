"""Our twins in ComfyUI's own memory management; see ``dynamic_vram.py``."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.comfy import server


@pytest.mark.comfy
def test_with_dynamic_vram() -> None:
    installation = server._installation()
    script = Path(__file__).with_name("dynamic_vram.py")
    done = subprocess.run(
        [installation / "venv/bin/python", script, installation], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]
