"""Kernels in Triton's interpreter run in the quick one."""

from __future__ import annotations

from tests.interpreter import hasten

hasten()
