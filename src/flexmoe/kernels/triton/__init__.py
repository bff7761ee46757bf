"""Triton kernels for NVIDIA GPUs, one file an operation. Importing any of them imports triton."""
