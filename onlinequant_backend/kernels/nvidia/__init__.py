"""Kernels for NVIDIA GPUs: cuBLAS, Triton and Gluon.

``operators`` has a function for each op, ``tuning`` says which kernel a shape runs on, and ``precompile`` compiles
kernels before they are needed. What imports Triton is imported by the first call that needs it.
"""

from .provider import Nvidia

__all__ = ["Nvidia"]
