"""The families of kernels for NVIDIA GPUs, and why each is off on a GPU. Importing this imports no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util

# The first Triton with the Gluon that the convolution is written in. There is no last one: a newer Triton than those
# tested counts if it has all of ``gluon_names``.
_LEAST_GLUON = (3, 6)


def families(capability: tuple[int, int]) -> dict[str, str | None]:
    """By family, why it is off on GPUs of this compute capability, or None if it is on."""
    plain, tma = _without(capability, (8, 0)), without_tma(capability)
    return {
        "cuBLAS matmul": _without(capability, (9, 0)),
        "TMA matmul": tma,
        "TMA matmul with GEGLU": tma,
        "TMA convolutions": tma,
        "Gluon convolutions": without_gluon(capability),
        "gather matmul": plain,
        "gather convolutions": plain,
        "TMA attention": tma,
        "gather attention": plain,
        "short attention": plain,
        "LayerNorm": plain,
        "GroupNorm": plain,
        "checks for changes": plain,
    }


def without_tma(capability: tuple[int, int]) -> str | None:
    """Why no kernel uses the tensor memory accelerator; None if kernels do."""
    return _without(capability, (9, 0)) or missing_descriptors()


def without_gluon(capability: tuple[int, int]) -> str | None:
    """Why the Gluon convolution does not run; None if it does. Its products are instructions of Hopper GPUs alone."""
    if capability >= (10, 0):
        return "its instructions exist only on compute capability 9.0"
    return without_tma(capability) or missing_gluon()


def missing_triton() -> str | None:
    """Why there is no Triton; None if there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


@functools.cache
def missing_descriptors() -> str | None:
    """Why this Triton has no tensor descriptors; None if it has."""
    return missing_triton() or _import_error("triton.tools.tensor_descriptor", "no tensor descriptors")


@functools.cache
def missing_gluon() -> str | None:
    """What this Triton lacks for the Gluon convolution; None if it has everything."""
    without = missing_triton()
    if without:
        return without
    version = _triton_version()
    if tuple(int(part) for part in version.split(".")[:2]) < _LEAST_GLUON:
        return "needs Triton {}.{}, and this is {}".format(*_LEAST_GLUON, version)
    return _import_error(f"{__package__}.gluon_names", "another Gluon")


def _without(capability: tuple[int, int], least: tuple[int, int]) -> str | None:
    if capability < least:
        return "needs compute capability {}.{}".format(*least)
    return missing_triton()


def _import_error(module: str, what: str) -> str | None:
    """What this Triton has, and the error of importing ``module``; None if there is none."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        reason = str(error).partition(" (")[0]  # without the path of a file
        return f"Triton {_triton_version()} has {what}: {reason}"
    return None


def _triton_version() -> str:
    return str(importlib.import_module("triton").__version__)
