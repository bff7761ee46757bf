"""For all tests: marks by folder, a reason where there is no GPU, no way to the hub, no deadlines for properties, and
the longest files first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

HERE = Path(__file__).parent

# Before any test imports huggingface_hub, which reads it once: a test that needs the network is a wrong test.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before any test imports triton, which reads it once: without an NVIDIA driver its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A shared machine is slow at times; pytest-timeout catches what hangs.
settings.register_profile("house", deadline=None)
settings.load_profile("house")


# Begun last, any of these would keep one worker busy for a minute or more while the other has nothing left to do.
LONG = (
    "test_native_sanitizers.py", "test_fused_decoder.py", "test_native_neon.py", "test_pages.py",
    "test_serve_scripts.py", "test_step_operations.py", "test_fused_prompts.py", "test_compile.py", "test_verify.py",
    "test_supervisor.py", "test_lifecycle.py", "test_ray.py", "test_torchrun.py", "test_models.py", "test_scripts.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with the name of its folder; skip those in tests/gpu where CUDA is missing; long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items:
        item.add_marker(item.path.relative_to(HERE).parts[0])
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and torch finds none here"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
