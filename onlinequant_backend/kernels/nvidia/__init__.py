"""Kernels for NVIDIA GPUs: cuBLAS, Triton and Gluon, which of them a shape runs on, and compiling them beforehand."""
