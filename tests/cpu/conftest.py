"""How torch starts each test: with one thread, since what is tested is small and idle threads spin beside other tests,
and with a seed of the test's own, so that a failure comes again when the test runs alone.
Kernels are interpreted quickly.
"""

from __future__ import annotations

import zlib

import pytest
import torch

from tests.interpreter import hasten

hasten()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server adds is measured in a second or two."""
    from flexmoe.bench import machine_serving

    monkeypatch.setattr(machine_serving, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(machine_serving, "_STREAMS", (1, 4))
    monkeypatch.setattr(machine_serving, "_TOKENS", 8)
