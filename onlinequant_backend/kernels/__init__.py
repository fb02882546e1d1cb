"""Kernels behind the ops of ``onlinequant_backend.ops``."""
