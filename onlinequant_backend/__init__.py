"""onlinequant: a ``torch.compile`` backend that makes diffusion models draw the same picture faster, in 8 bit."""

from pathlib import Path as _Path

# In a checkout ``passes`` and ``comfy_integration`` lie beside this package; in a wheel, inside it.
if not (_Path(__file__).parent / "passes").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from .backend import onlinequant
from .config import QuantConfig
from .errors import OnlineQuantError
from .progress import Update, told_to
from .report.report import NodeDecision, Report, reports
from .runtime.control import copied_bytes, invalidate, release, reset
from .runtime.sampling import SamplingRun, sampling_run

__all__ = [
    "NodeDecision",
    "OnlineQuantError",
    "QuantConfig",
    "Report",
    "SamplingRun",
    "Update",
    "copied_bytes",
    "invalidate",
    "onlinequant",
    "release",
    "reports",
    "reset",
    "sampling_run",
    "told_to",
]
__version__ = "0.1.0"
