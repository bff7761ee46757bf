"""DecodeModel: a model in the C kernels' terms. Enters: weights by address, rows by token. Leaves: logits.

Only addresses cross the border, so the tensors behind them are held here. The structures are those of model.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexmoe.errors import EngineError
from flexmoe.kernels.cpu import library
from flexmoe.kernels.cpu.screen import Screen
from flexmoe.kernels.quantize import QuantizedMatrix, Weights

_I64, _F32, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_FORMATS: dict[torch.dtype | int, int] = {torch.float32: 0, torch.bfloat16: 1, 8: 2, 4: 3}  # as in model.h
_LANES = 16  # head sizes must be a multiple of the vectors of vector.h


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias", "scales")),
        *((name, _I64) for name in ("n", "k", "format")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("half", "hidden", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")),
        *((name, _I64) for name in ("window", "qk_norm", "num_experts", "num_slots", "top_k", "expert_width")),
        *((name, _I64) for name in ("renormalize", "dense_width")),
        *((name, _F32) for name in ("eps", "clip")),
        *((name, _POINTER) for name in ("input_norm", "q_norm", "k_norm", "mlp_norm")),
        ("qkv", _Linear),
        ("out", _Linear),
        *((name, _POINTER) for name in ("router", "slot_of")),
        *((name, _Linear) for name in ("gate_up", "down")),
        *((name, _Linear) for name in ("dense_gate_up", "dense_down", "dense_gate")),
        ("cache", _POINTER),
    )


class _Screen(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("codes", "scales", "slack", "lengths", "shifts")),
        ("stride", _I64),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("half", "hidden", "num_layers")),
        ("embedding", _Linear),
        ("norm", _POINTER),
        ("head", _Linear),
        ("screen", _Screen),
        ("frequencies", _POINTER),
        *((name, _F32) for name in ("rotary_scale", "eps")),
        ("layers", ctypes.POINTER(_Layer)),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _I64) for name in ("rows", "block_size", "table_width", "prompts", "num_samples")),
        *((name, _POINTER) for name in ("token_ids", "tables", "lengths", "samples")),
        *((name, _POINTER) for name in ("x", "logits", "topk_ids", "topk_weights")),
        *((name, _I64) for name in ("first", "last", "parts")),
    )


class Part(IntFlag):
    """What a call of `DecodeModel.run` computes, in this order.

    BEST in place of HEAD: each row's largest logit, and -inf for any that is certainly smaller; needs a screen.
    """

    EMBED = 1
    ATTEND = 2
    FEED = 4
    HEAD = 8
    BEST = 16
    ALL = EMBED | ATTEND | FEED | HEAD
    GREEDY = EMBED | ATTEND | FEED | BEST


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: plain numbers by the names of `_Layer`, tensors by the same, and its projections.

    linears: name -> (weight [n, k] or, of experts, [S, n, k]; bias [n] or None). All tensors are contiguous; router and
    slot_of are fp32 and int64, the rest share one dtype, fp32 or bf16, unless they are quantized.
    """

    numbers: dict[str, float]
    tensors: dict[str, Tensor]
    linears: dict[str, tuple[Weights, Tensor | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OuterWeights:
    """What stands around the layers: embedding and head [V, H], the last norm [H], rotary frequencies fp32 [R / 2].

    screen: of the head, for Part.BEST.
    """

    embedding: Weights
    head: Weights
    norm: Tensor
    eps: float
    frequencies: Tensor
    rotary_scale: float
    screen: Screen | None = None


@dataclass(frozen=True, slots=True)
class PagedRows:
    """T rows, each with the keys of its sequence that it sees.

    token_ids: int64 [T]; tables: int32 [T, M] blocks of each row's sequence; lengths: int32 [T] keys that each row
    sees, its own included; samples: int64 [N], the rows whose logits are wanted. prompts: rows of one sequence may
    follow each other; else each is the latest token of a sequence of its own.
    """

    token_ids: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]
    block_size: int
    prompts: bool = False


class Activations:
    """Tensors of one step of T rows: x fp32 [T, H], logits fp32 [N, V], topk_ids and topk_weights [T, K]."""

    __slots__ = ("logits", "topk_ids", "topk_weights", "x")

    def __init__(self, rows: int, samples: int, hidden: int, vocab: int, top_k: int) -> None:
        self.x = torch.empty(rows, hidden)
        self.logits = torch.empty(samples, vocab)
        self.topk_ids = torch.empty(rows, top_k, dtype=torch.int64)
        self.topk_weights = torch.empty(rows, top_k)


def supports(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the C kernels cover this dtype and head size; others are left to torch."""
    return dtype in (torch.float32, torch.bfloat16) and head_dim % _LANES == 0


def _pool(threads: int, isa: str) -> int:
    """The address of a pool of threads, shared by all engines of this process that use as many at this level.

    Raises EngineError in a fork of the process that made it: threads are not copied, so it would wait for ever.
    """
    address, process = _make_pool(threads, isa)
    if process != os.getpid():
        raise EngineError(
            "this process was forked from one that already runs an engine, whose threads do not come along; "
            'start it with the method "spawn" of multiprocessing.'
        )
    return address


@functools.cache
def _make_pool(threads: int, isa: str) -> tuple[int, int]:
    """The address of a new pool and the process that made it."""
    native = library.load(isa).library
    assert native is not None
    native.fm_pool.restype = _POINTER
    pool = native.fm_pool(ctypes.c_int(threads))
    if not pool:
        raise EngineError(f"{threads} threads could not be started for the CPU kernels; use fewer (threads=1).")
    return int(pool), os.getpid()


class DecodeModel:
    """A whole model that computes a step's rows in one call, with the caller and `threads` - 1 others."""

    def __init__(self, layers: Sequence[LayerWeights], outer: OuterWeights, threads: int, isa: str = "auto") -> None:
        native = library.load(isa).library
        assert native is not None, "ask library.load() first"
        self._pool = _POINTER(_pool(threads, isa))
        self._call = native.fm_step
        self._held = (list(layers), outer)
        half = int(outer.norm.dtype is torch.bfloat16)
        self._layers = (_Layer * len(layers))(*(_as_struct(layer, half) for layer in layers))
        self._vocab, self._hidden = outer.head.shape
        self._top_k = max((int(layer.numbers.get("top_k", 0)) for layer in layers), default=0)
        self._model = _Model(
            half, self._hidden, len(layers), _as_linear(outer.embedding), _address(outer.norm), _as_linear(outer.head),
            _as_screen(outer.screen), _address(outer.frequencies), outer.rotary_scale, outer.eps, self._layers,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def bind_cache(self, caches: Sequence[Tensor]) -> None:
        """Tell each layer its KV cache [slots, 2, Hkv, D]."""
        for layer, cache in zip(self._layers, caches, strict=True):
            layer.cache = _address(cache)

    def activations(self, rows: PagedRows) -> Activations:
        """Tensors for a step of these rows, unfilled."""
        return Activations(len(rows.token_ids), len(rows.samples), self._hidden, self._vocab, self._top_k)

    def run(self, rows: PagedRows, out: Activations, parts: Part = Part.ALL, layer: int | None = None) -> None:
        """Compute `parts` of a step, of all layers or of one, into `out`; writes the rows' keys and values."""
        assert Part.BEST not in parts or self._model.screen.codes, "there is no screen"
        count, width = rows.tables.shape
        first, last = (0, self.num_layers) if layer is None else (layer, layer + 1)
        step = _Step(
            count, rows.block_size, width, int(rows.prompts), len(rows.samples),
            _start(rows.token_ids), _start(rows.tables), _start(rows.lengths), _start(rows.samples),
            out.x.data_ptr(), out.logits.data_ptr(), out.topk_ids.data_ptr(), out.topk_weights.data_ptr(),
            first, last, int(parts),
        )  # fmt: skip
        if self._call(self._pool, ctypes.byref(self._model), ctypes.byref(step)):
            raise MemoryError("no memory for the buffers of a step")


def _start(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "the C kernels read contiguous tensors"
    return tensor.data_ptr()


def _as_struct(layer: LayerWeights, half: int) -> _Layer:
    struct = _Layer(half=half, **layer.numbers)
    for name, tensor in layer.tensors.items():
        setattr(struct, name, _address(tensor))
    for name, (weight, bias) in layer.linears.items():
        setattr(struct, name, _as_linear(weight, bias))
    return struct


def _as_screen(screen: Screen | None) -> _Screen:
    return _Screen() if screen is None else _Screen(*map(_address, screen.tensors()), screen.codes.shape[1])


def _as_linear(weight: Weights, bias: Tensor | None = None) -> _Linear:
    n, k = weight.shape[-2:]
    added = None if bias is None else _address(bias)
    if isinstance(weight, QuantizedMatrix):
        return _Linear(_address(weight.codes), added, _address(weight.scales), n, k, _FORMATS[weight.bits])
    return _Linear(_address(weight), added, None, n, k, _FORMATS[weight.dtype])
