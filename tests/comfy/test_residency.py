"""Our twins in ComfyUI's own memory management; see ``dynamic_vram.py``."""

from __future__ import annotations

import pytest

from tests.comfy import server


@pytest.mark.comfy
def test_with_dynamic_vram() -> None:
    server.run_script("dynamic_vram.py")
