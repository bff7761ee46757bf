"""Torch starts each test with one thread: what is tested is small, and threads that wait spin beside other tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
