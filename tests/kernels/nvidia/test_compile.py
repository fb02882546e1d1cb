"""That every kernel compiles for GPUs that need not be there, and what depends on floating-point fusion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
from onlinequant_backend.kernels.nvidia import families, launch


@pytest.mark.slow
def test_all_kernels_compile_as_before_triton_had_another_default_of_fusion(tmp_path: Path) -> None:
    """Triton 3.10 does not fuse unless asked to. Up to 3.9 this is the same code as without a word about it."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "--fusion", "9.0"]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    outcomes = json.loads(run.stdout)["found"]["9.0"]
    assert {family: outcome["failed"] for family, outcome in outcomes.items() if outcome["failed"]} == {}
    off = {family: outcome["off"] for family, outcome in outcomes.items() if outcome["off"]}
    gluon = families.missing_gluon()
    assert off == ({"Gluon convolutions": gluon} if gluon else {})
    kernels = {call.split(": ")[1] for outcome in outcomes.values() for call in outcome["compiled"]}
    expected = launch.FUSES_PRODUCTS_AND_SUMS.keys() - ({"_gluon_conv_kernel"} if gluon else set())
    assert kernels == expected
    assert [kernel for outcome in outcomes.values() for kernel in outcome["by_default"]] == []
    dependent = {kernel for outcome in outcomes.values() for kernel in outcome["by_opposite"]}
    assert dependent == {kernel for kernel in expected if launch.FUSES_PRODUCTS_AND_SUMS[kernel]}
