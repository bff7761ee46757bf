"""A decode step to tune in: a few layers of a model with random weights, as the engine runs them.

Kernels of a step start before the one ahead of them has ended, and find in the caches what that one left. So what a
tile is worth shows in a step, not alone. Enters: a ModelConfig, rows, and a table of tiles. Leaves: the microseconds of
a step in a CUDA graph, and what one of its stages computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flexmoe.bench.kernel_timer import Launch, Timing, time_launches
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.triton.tiles import TileTable
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.hopper import HopperKernels
from flexmoe.models.loader import fill_dummy
from flexmoe.planner.floor import expected_distinct, floor

# What an operation computes, so that a tile's result can be compared: what attention or the feed-forward adds to the
# residual stream, the router's logits, and those of the head.
Stage = Literal["attention", "feed", "router", "logits"]

_LAYERS = 6  # they rotate: no cache holds the weights of all
_SMALL_VOCABULARY = 1024
_BLOCK = 16  # tokens of a KV block
_CONTEXT, _LONG_CONTEXT = 256, 2048  # keys of each row
_MOST_KEYS = 128 * 1024  # of all rows together: memory
_STEPS = 2  # in a graph

Timer = Callable[[list[Launch], int], Timing]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Rows with equally long sequences, and their keys and values; long: they are cut for thousands."""

    rows: DeviceRows
    cache: KVCache
    long: bool


class MiniModel:
    """Layers of a model; with its whole vocabulary only one, of which the head is tuned."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, head: bool, timer: Timer = time_launches
    ) -> None:
        layers = 1 if head else _affordable_layers(config, dtype, device)
        self.config = _cut(config, layers, config.vocab_size if head else _SMALL_VOCABULARY)
        self.dtype, self.device, self._timer = dtype, device, timer
        self._model = Decoder(self.config, ParallelPlan(), "reference", _LONG_CONTEXT, dtype=dtype, device=device)
        stored: torch.dtype = getattr(torch, config.checkpoint_dtype)
        fill_dummy({name: param.data for name, param in self._model.eval().named_parameters()}, stored=stored)
        self._model.pack(in_place=True)

    def inputs(self, rows: int, *, long: bool = False) -> Inputs:
        """Random ones for steps of `rows`."""
        keys = max(_CONTEXT, min(_LONG_CONTEXT, _MOST_KEYS // rows)) if long else _CONTEXT
        config, blocks = self.config, -(-keys // _BLOCK)
        ints = functools.partial(torch.full, dtype=torch.int32, device=self.device)
        tokens = torch.randint(config.vocab_size, (rows,), device=self.device)
        tables = torch.randperm(rows * blocks, device=self.device).int()
        cache = KVCache(config, rows * blocks, _BLOCK, self.dtype, self.device)
        for layer in cache.layers:
            layer.normal_()
        on_device = DeviceRows(tokens, ints((rows,), -1), ints((rows,), keys), tables, ints((1,), blocks))
        return Inputs(on_device, cache, long)

    def decoder(self, table: TileTable, rows: int) -> FusedDecoder:
        """It computes steps of up to `rows` with the table's tiles, whatever other kernels an engine would take."""
        return FusedDecoder(self._model, _LONG_CONTEXT, self.device, table, rows, hopper=HopperKernels())

    def run(self, decoder: FusedDecoder, inputs: Inputs, probe: Probe | None = None) -> None:
        """One step."""
        decoder.step(inputs.rows, None, inputs.cache, probe, long=inputs.long)

    def microseconds(self, decoder: FusedDecoder, inputs: Inputs) -> float:
        """A layer of a step; of the model with the head: one layer and the head."""
        step = functools.partial(self.run, decoder, inputs)
        return self._timer([step], _STEPS).median / self.config.num_layers

    def moved(self, rows: int) -> float:
        """Bytes that `microseconds` must read, if all experts are equally likely."""
        config = self.config
        needed = floor(config, rows, _CONTEXT, self.dtype.itemsize, expected_distinct(config, rows))
        return needed.total / config.num_layers

    def output(self, decoder: FusedDecoder, inputs: Inputs, stage: Stage) -> Tensor:
        """What the first layer's `stage` computes, or the head, in memory that held nothing but NaN."""
        for tensor in vars(decoder.buffers).values():
            for part in tensor if isinstance(tensor, tuple) else (tensor,):
                if part.is_floating_point() or part.dtype is torch.uint8:
                    part.fill_(torch.nan if part.is_floating_point() else 255)  # bytes of 255 are NaN, too
        seen = _Seen(decoder, stage)
        self.run(decoder, inputs, seen)
        assert seen.kept is not None
        return seen.kept


class _Seen:
    """A probe that keeps one stage's output."""

    def __init__(self, decoder: FusedDecoder, stage: Stage) -> None:
        self._decoder, self._stage = decoder, stage
        self.kept: Tensor | None = None

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Called by the step; layer -1 is the head."""
        if layer > 0:
            return
        if self._stage == "router" and stage == "topk_ids":
            self.kept = self._decoder.buffers.router_logits[: len(tensor)].clone()
        elif stage == self._stage or (self._stage == "feed" and stage in ("moe", "mlp")):
            self.kept = tensor.float()


def _affordable_layers(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """As many as half of the free memory holds, at most `_LAYERS`."""
    if device.type != "cuda":
        return _LAYERS
    layer = config.num_parameters() // config.num_layers * dtype.itemsize
    return max(1, min(_LAYERS, torch.cuda.mem_get_info(device)[0] // 2 // layer))


def _cut(config: ModelConfig, layers: int, vocabulary: int) -> ModelConfig:
    """A few layers, those with experts first, and a smaller vocabulary."""
    chosen = sorted(config.layers, key=lambda layer: not layer.is_moe)[:layers]
    return replace(config, layers=tuple(chosen), vocab_size=min(vocabulary, config.vocab_size))
