"""Which kernels for Hopper a model gets, without a GPU: by its shapes, and where they cannot be had."""

from __future__ import annotations

import logging

import pytest
import torch

from flexmoe.config.model import LayerConfig
from flexmoe.errors import FlexMoEError
from flexmoe.kernels.hopper import attention, compiler
from flexmoe.models import hopper
from flexmoe.models.hopper import HopperKernels, hopper_kernels, imagined_kernels, served
from flexmoe.models.presets import PRESETS
from tests.cpu.tiny_decoders import config

HOPPER, CUDA = (9, 0), torch.device("cuda", 0)
MIXTRAL = PRESETS["mixtral-8x7b"].config


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
    monkeypatch.setattr("flexmoe.kernels.hopper.driver.why_no_driver", lambda: "")


def test_reference_models_are_served() -> None:
    pytest.importorskip("cuda.bindings")
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"):
        kernels = imagined_kernels(*served(HOPPER, PRESETS[name].config, torch.bfloat16))
        assert kernels.words == "Triton, CUDA for Hopper (attention, experts)"


def test_a_model_is_served_in_part() -> None:
    pytest.importorskip("cuda.bindings")
    small_heads = config(attention={"head_dim": 64})
    assert imagined_kernels(*served(HOPPER, small_heads, torch.bfloat16)).words == "Triton, CUDA for Hopper (experts)"
    dense = config(attention={"head_dim": 128}, layers=(LayerConfig(is_moe=False),))
    assert imagined_kernels(*served(HOPPER, dense, torch.float16)).attention is not None


@pytest.mark.parametrize(
    ("capability", "dtype"), [((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16), (HOPPER, torch.float32)]
)
def test_nobody_else_is_served(
    capability: tuple[int, int], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kernels = imagined_kernels(*served(capability, MIXTRAL, dtype))
    assert kernels == HopperKernels()
    assert kernels.words == "Triton"
    assert len(caplog.messages) == 2  # why, for attention and for experts


def test_a_cpu_is_not_asked() -> None:
    assert hopper_kernels(torch.device("cpu"), MIXTRAL, torch.bfloat16) == HopperKernels()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("error", [FlexMoEError("NVRTC: no"), ImportError("no libnvrtc"), RuntimeError("no dlopen")])
def test_where_they_cannot_be_compiled_triton_serves_and_a_warning_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(hopper, "PromptAttention", refuse)
    assert hopper_kernels(CUDA, MIXTRAL, torch.bfloat16) == HopperKernels()
    assert str(error) in caplog.text
    assert "Triton's are in their place" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_spills_no_register_and_its_products_overlap(dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    text, macros = attention.source(dtype)
    options = [*compiler.options_for(macros, HOPPER), "--ptxas-options=-v"]
    cubin, said = compiler.compile_now("attention", text, options)
    assert cubin.startswith(b"\x7fELF")
    assert "Potential Performance Loss" not in said
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "warning" not in said
