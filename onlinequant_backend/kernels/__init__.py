"""The kernels behind the ops of ``onlinequant_backend.ops``, one provider for each vendor.

A provider (``provider.PROVIDERS``) answers, by a tensor's own device, which formats and ops it has and why not. The ops
hand kernels their operands as ``Operands``, so that a new op is a row of ``ops``, an oracle in ``reference``, and a
function of ``cpu`` and of ``nvidia.operators``. Importing this imports no Triton.
"""

from .formats import Format
from .operands import Operands
from .precision import Precision, resolve
from .provider import Provider, provider_of

__all__ = ["Format", "Operands", "Precision", "Provider", "provider_of", "resolve"]
