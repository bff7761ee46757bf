"""What the operations of a layer take in torch, as prompts go through it. Enters: a ModelConfig, rows. Leaves: seconds.

The parts are timed through the layer's own modules; what a layer has beside attention and experts, norms, router and
sums, is called "router". Attention proper is the module less its projections, of calls in turns, lest what else the
machine does counts as attention; it is below 0 if it is lost in noise all the same. Layers rotate, so that weights come
from memory.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder, DecoderLayer
from flexmoe.models.loader import fill_dummy

_BLOCK = 16
_FEWEST, _MOST = 5, 30  # times that a call is timed
_SECONDS, _LONGEST = 0.15, 1.5  # for one operation; and even if it was not timed often
_SHORT = 16  # tokens of a prompt that leaves a GPU waiting
_AHEAD = 8_000_000  # cycles that a GPU is kept busy while calls pile up

Call = Callable[[int], Any]  # of the layer with that number


class TorchLayers:
    """Some layers on a device. native_threads: pack as a process with C kernels does, else as ranks do."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, native_threads: int | None = None
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        backend = "triton" if device.type == "cuda" else "cpu"
        self.model = Decoder(config, ParallelPlan(), backend, 2**15, dtype=dtype, device=device).eval()
        fill_dummy({name: p.data for name, p in self.model.named_parameters()}, 0, dtype)
        self.model.pack(native_threads, in_place=device.type == "cuda")

    @torch.inference_mode()
    def prompt(self, rows: int, before: int = 0) -> dict[str, float]:
        """Seconds of each operation of one layer, for `rows` tokens of one sequence behind `before` others."""
        keys = before + rows
        cache = self._cache(keys)
        positions = torch.arange(before, keys, device=self.device)
        mask = None
        if before:
            mask = torch.arange(keys, device=self.device) <= positions[:, None]
        span = PrefillSpan(slice(0, rows), slice(0, keys), mask)
        return self._parts(cache, positions, positions, [span], "prompt")

    @torch.inference_mode()
    def decode(self, rows: int, keys: int) -> dict[str, float]:
        """The same for rows of one token each, in sequences of so many keys."""
        cache = self._cache(rows * keys)
        table = torch.arange(rows * keys, device=self.device).view(rows, keys)
        positions = torch.full((rows,), keys - 1, device=self.device)
        groups = [DecodeGroup(slice(r, r + 1), slice(r * keys, (r + 1) * keys), None) for r in range(rows)]
        if rows > 1 and keys < 256:  # engine/batch.py gathers short ones
            groups = [DecodeGroup(slice(0, rows), table, None)]
        return self._parts(cache, positions, table[:, -1].contiguous(), groups, "attention")

    def _cache(self, keys: int) -> KVCache:
        cache = KVCache(self.config, -(-keys // _BLOCK), _BLOCK, self.dtype, self.device)
        for layer in cache.layers:
            layer.normal_()
        return cache

    def _parts(
        self, cache: KVCache, positions: Tensor, slots: Tensor, groups: Sequence[DecodeGroup | PrefillSpan], name: str
    ) -> dict[str, float]:
        rows, config, layers = len(positions), self.config, self.model.decoder_layers
        batch = ForwardBatch(positions, positions, slots, {None: groups}, most_rows=rows)
        cos, sin = self.model.rotary(positions)
        x = torch.randn(rows, config.hidden_size, device=self.device).to(self.dtype)
        heads = torch.randn(rows, config.attention.num_heads * config.attention.head_dim, device=self.device)
        heads = heads.to(self.dtype)
        ids, weights = _choices(config, rows, self.device)

        def beside(layer: DecoderLayer) -> None:
            normed = layer.input_norm(x)
            between = x + normed
            assert layer.moe is not None
            layer.moe.router(layer.mlp_norm(between))
            between.add_(normed)

        def timed(*calls: Callable[[DecoderLayer, int], Any]) -> list[tuple[float, ...]]:
            return self.turns([functools.partial(lambda call, i: call(layers[i], i), call) for call in calls])

        took = timed(
            lambda layer, i: layer.attention(x, cos, sin, cache.layers[i], batch),
            lambda layer, _: layer.attention.qkv(x),
            lambda layer, _: layer.attention.out(heads),
        )
        parts = {
            "qkv": [qkv for _, qkv, _ in took], "out": [out for _, _, out in took],
            name: [whole - qkv - out for whole, qkv, out in took],
            "experts": [one for one, in timed(lambda layer, _: layer.moe.experts(x, ids, weights))],  # type: ignore[union-attr]
            "router": [one for one, in timed(lambda layer, _: beside(layer))],
        }  # fmt: skip
        return {part: statistics.median(seconds) for part, seconds in parts.items()}

    @torch.inference_mode()
    def host_seconds(self, chunks: int = 1) -> float:
        """What the host takes to launch one layer, for prompts so short that a GPU waits for it."""
        rows = _SHORT * chunks
        cache, positions = self._cache(rows), torch.arange(rows, device=self.device)
        parts = [slice(start, start + _SHORT) for start in range(0, rows, _SHORT)]
        batch = ForwardBatch(positions, positions, positions, {None: [PrefillSpan(part, part, None) for part in parts]})
        x = torch.randn(rows, self.config.hidden_size, device=self.device).to(self.dtype)
        cos, sin = self.model.rotary(positions)
        took = []
        for _ in range(_MOST):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for layer, kept in zip(self.model.decoder_layers, cache.layers, strict=True):
                x = layer(x, cos, sin, kept, batch)
            torch.cuda.synchronize(self.device)
            took.append((time.perf_counter() - start) / len(cache.layers))
        return statistics.median(took[_FEWEST:])

    def turns(self, calls: Sequence[Call]) -> list[tuple[float, ...]]:
        """Seconds of each of the calls, turn after turn, a layer each."""
        layers = itertools.cycle(range(self.config.num_layers))
        timed = _timed_on_gpu if self.device.type == "cuda" else _timed
        begun = time.perf_counter()
        for _ in range(2):
            for call in calls:
                timed(call, next(layers))
        took: list[tuple[float, ...]] = []
        end = time.perf_counter() + _SECONDS * len(calls)
        while len(took) < _MOST and (len(took) < _FEWEST or time.perf_counter() < end):
            took.append(tuple(timed(call, next(layers)) for call in calls))
            if time.perf_counter() > begun + _LONGEST * len(calls):
                break
        return took


def _choices(config: ModelConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random experts [T, K], each once a row, and their weights [T, K]."""
    assert config.moe is not None
    ids = torch.rand(rows, config.moe.num_experts, device=device).topk(config.moe.top_k).indices
    return ids, torch.rand(rows, config.moe.top_k, device=device).softmax(-1)


def _timed(call: Call, layer: int) -> float:
    start = time.perf_counter()
    call(layer)
    return time.perf_counter() - start


def _timed_on_gpu(call: Call, layer: int) -> float:
    """The time on the device alone: it is kept busy until all launches of the call wait behind each other."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_AHEAD)
    start.record()
    call(layer)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
