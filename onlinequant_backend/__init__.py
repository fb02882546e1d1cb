"""onlinequant: a ``torch.compile`` backend that makes diffusion models draw the same picture faster, in 8 bit."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

# In a checkout ``passes`` and ``comfy_integration`` lie beside this package; in a wheel, inside it.
if not (_Path(__file__).parent / "passes").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from .errors import OnlineQuantError
from .progress import Update, told_to
from .report import NodeDecision, Report, reports
from .runtime import SamplingRun, sampling_run

if _TYPE_CHECKING:
    from .backend import copied_bytes, host_bytes, invalidate, onlinequant, place, release, reset
    from .config import QuantConfig

__all__ = [
    "NodeDecision",
    "OnlineQuantError",
    "QuantConfig",
    "Report",
    "SamplingRun",
    "Update",
    "copied_bytes",
    "host_bytes",
    "invalidate",
    "onlinequant",
    "place",
    "release",
    "reports",
    "reset",
    "sampling_run",
    "told_to",
]
__version__ = "0.2.0"

# These import torch's compiler, which takes seconds, and whatever only reads the cache needs none of it.
_MODULES = {
    "QuantConfig": ".config",
    "copied_bytes": ".backend",
    "host_bytes": ".backend",
    "invalidate": ".backend",
    "onlinequant": ".backend",
    "place": ".backend",
    "release": ".backend",
    "reset": ".backend",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First what imports all others: threads that import them in different orders would wait for each other.
    _import_module(".backend", __name__)
    value: object = getattr(_import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
