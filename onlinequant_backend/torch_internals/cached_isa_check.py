"""Caches which vector instructions the C++ compiler supports, rather than checking at each start. Inductor compiles a
program for the check and loads it in another process, which imports torch: three seconds per start.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

from torch._inductor import cpu_vec_isa

from ..best_effort import best_effort


def asked_once(folder: Path) -> contextlib.AbstractContextManager[Any]:
    """Within the block, supported instructions are recorded in ``folder``, for this compiler and version of torch.
    Inductor only checks the instructions of this CPU. Failed checks are repeated.
    """
    fingerprint, ask = cpu_vec_isa._get_isa_dry_compile_fingerprint, cpu_vec_isa.VecISA.check_build

    def ask_once(instructions: Any, code: str) -> bool:
        asked = f"{fingerprint(instructions.build_arch_flags())}\0{code}"  # programs differ for equal flags
        note = folder / f"compiles-{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
        if note.exists():
            return True
        works = bool(ask(instructions, code))
        if works:
            with best_effort("cannot write %s", note):
                note.touch()
        return works

    return mock.patch.object(cpu_vec_isa.VecISA, "check_build", ask_once)
