"""Memory on large pages: shapes, alignment, order, what a model's weights become."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from flexmoe import LLM
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.layers import large_pages
from tests.cpu.tiny_decoders import NEEDS_COMPILER


def test_tensors_lie_side_by_side_and_start_on_lines() -> None:
    parts = [((3, 5), torch.bfloat16), ((0, 7), torch.float32), ((33,), torch.int8), ((2, 2), torch.float32)]
    tensors = large_pages.zeros(parts)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] == [(tuple(s), d) for s, d in parts]
    held = [tensor for tensor in tensors if tensor.numel()]
    first = held[0].data_ptr()
    assert first % (2 * 2**20) == 0
    assert [tensor.data_ptr() - first for tensor in held] == [0, 64, 128]
    assert all(tensor.eq(0).all() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(tensor.eq(number).all() for number, tensor in enumerate(tensors)), "two tensors overlap"


def test_no_tensors() -> None:
    assert large_pages.zeros([]) == []


def test_moved_tensors_keep_their_kind() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16), requires_grad=False)
    codes = torch.ones(7, dtype=torch.int8)
    large_pages.move_to_large_pages([parameter, codes])
    assert isinstance(parameter, torch.nn.Parameter)
    assert (parameter.shape, parameter.dtype) == ((4, 4), torch.bfloat16)
    assert (codes.shape, codes.dtype) == ((7,), torch.int8)
    assert codes.data_ptr() - parameter.data_ptr() == 64


def test_memory_goes_with_the_last_tensor() -> None:
    first, second = large_pages.zeros([((4,), torch.float32), ((4,), torch.float32)])
    memory = weakref.ref(first.untyped_storage())
    del first
    second.fill_(1.0)
    assert second.eq(1.0).all()
    del second
    gc.collect()
    assert memory() is None


@NEEDS_COMPILER
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_that_c_kernels_read_lie_together(quantization: str | None) -> None:
    with LLM(max_model_len=64, num_blocks=8, quantization=quantization) as llm:
        model = llm.engine.local_runner.model
        assert model.native is not None
        held = [
            tensor
            for weights in model.weights().values()
            for tensor in ([weights.codes, weights.scales] if isinstance(weights, QuantizedMatrix) else [weights])
        ]
        assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 1
        assert len({tensor.untyped_storage().data_ptr() for tensor in llm.engine.local_runner.cache.layers}) == 1
