"""The kernels behind the ops of ``onlinequant_backend.ops``, one provider for each vendor.

A provider (``provider.PROVIDERS``) answers which formats and ops there are on a tensor's device, or why not. The ops
hand kernels their operands as ``Operands``. A new op is a row in ``ops``, an oracle in ``reference``, and a function in
``cpu`` and in ``nvidia.operators``. Importing this imports no Triton.
"""

from .formats import Format
from .operands import Operands
from .precision import Precision, resolve
from .provider import Provider, provider_of

__all__ = ["Format", "Operands", "Precision", "Provider", "provider_of", "resolve"]
