"""The capabilities of this machine's processors, as reported by torch."""

from __future__ import annotations

import torch


def onednn_has_int8() -> bool:
    """Whether this torch has oneDNN's int8 kernels for this CPU."""
    return torch.backends.mkldnn.is_available() and "onednn" in torch.backends.quantized.supported_engines


def cpu_flags() -> dict[str, bool]:
    """The 8-bit matrix instructions of this CPU: ``avx512_vnni``, ``avx_vnni``, ``amx_int8`` and ``avx2``."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "avx512_vnni": bool(torch.cpu._is_vnni_supported()),
        "avx_vnni": bool(capabilities.get("avx_vnni", False)),
        "amx_int8": bool(torch.cpu._is_amx_tile_supported()),
        "avx2": bool(torch.cpu._is_avx2_supported()),
    }


def int8_instructions() -> str | None:
    """The best of this CPU's instructions that accumulate 8-bit products in 32 bits; None if it has none."""
    flags = cpu_flags()
    return next((flag for flag in ("amx_int8", "avx512_vnni", "avx_vnni") if flags[flag]), None)
