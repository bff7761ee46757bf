"""Kernels in CUDA C++ for Hopper GPUs, compiled by the NVRTC that comes with torch when they are first needed."""
