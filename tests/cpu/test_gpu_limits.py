"""What the Triton kernels ask of a GPU: its age, a compiler, and no more shared memory than it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexmoe.kernels import gpu
from flexmoe.models.device_rows import why_not_fused
from flexmoe.models.presets import PRESETS

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16
SMALL, AMPERE, HOPPER = (99 * 1024, False), (163 * 1024, False), (227 * 1024, True)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")


@pytest.mark.usefixtures("hopper")
def test_a_gpu_without_compiler_or_headers_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.why_no_triton(GPU) == ""
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert "python3-dev" in gpu.why_no_triton(GPU)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu, "find_compiler", lambda: None)
    assert "apt-get install gcc" in gpu.why_no_triton(GPU)


@pytest.mark.usefixtures("hopper")
def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.why_no_triton(GPU) == "NVIDIA H200 is older than Ampere"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("block_size", "reason"), [(16, ""), (1, ""), (24, "block_size 24 is not a power of two")])
def test_blocks_that_the_kernels_cannot_divide_are_left_to_torch(block_size: int, reason: str) -> None:
    assert why_not_fused(PRESETS["mixtral-8x7b"].config, GPU, "triton", block_size) == reason


@pytest.mark.parametrize("memory", [SMALL, AMPERE, HOPPER])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_default_tiles_fit_the_shared_memory(
    memory: tuple[int, bool], preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the compiler reports: a stage holds a tile of rows and one of weights; before Hopper there is one less."""
    from flexmoe.kernels.triton import expert_down, expert_gate_up, norm_linear

    monkeypatch.setattr(gpu, "shared_memory", lambda: memory)
    config = PRESETS[preset].config
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    shape = (moe.top_k, moe.num_experts, hidden, moe.expert_width, BF16)
    for rows in (1, 2, 8, 16, 32, 64, 100, 128, 256, 1024, 8192):
        up, down = expert_gate_up.default_tile(rows, *shape), expert_down.default_tile(rows, *shape)
        check(memory, up.block_m + 2 * up.block_n, up)
        check(memory, down.block_m + down.block_n, down)
        for n, k in ((config.qkv_size, hidden), (hidden, hidden), (config.vocab_size, hidden)):
            tile = norm_linear.default_tile(rows, n, k, BF16)
            if isinstance(tile, norm_linear.DotTile):
                check(memory, tile.block_t + tile.block_n, tile)


def check(memory: tuple[int, bool], rows: int, tile: Any) -> None:
    limit, hopper = memory
    stages = max(1, tile.num_stages if hopper else tile.num_stages - 1)
    assert rows * tile.block_k * BF16.itemsize * stages <= limit, tile
    assert tile.num_stages >= 1
