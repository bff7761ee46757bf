"""What each operation adds to a decode step on a GPU: the step's graph with all operations behind it left out.

Kernels of a step start before the one ahead of them has ended, so what one costs is not what it takes alone. A few
layers of a model run as in the engine, with random weights. Enters: a ModelConfig and rows. Leaves: seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from flexmoe.bench.kernel_timer import Launch, Timing, time_launches
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.triton import norm_linear
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models import fused, fused_experts, fused_grouped
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows
from flexmoe.models.loader import fill_dummy

OPERATIONS = (  # as they come in a step
    "qkv", "decode_attention", "o", "route", "topk", "group_by_expert", "topk_by_expert", "expert_gate_up_gemv",
    "expert_down_gemv", "expert_gate_up_grouped", "expert_down_grouped", "combine", "combine_norm", "head",
)  # fmt: skip
_PROJECTIONS = ("qkv", "o", "head")
_BLOCK = 16  # tokens of a KV block
_LONG = 1024  # keys of a row from which attention is cut for thousands, see engine/cuda_graph.py

Timer = Callable[[list[Launch], int], Timing]


class Steps:
    """Some layers of a model, and rows of equal length, as a decode step finds them."""

    def __init__(
        self, config: ModelConfig, device: torch.device, most_keys: int = 4096, timer: Timer = time_launches
    ) -> None:
        self.config, self._device, self._timer = config, device, timer
        model = Decoder(config, ParallelPlan(), "reference", most_keys, dtype=torch.bfloat16, device=device).eval()
        fill_dummy({name: p.data for name, p in model.named_parameters()}, 0, torch.bfloat16)
        model.pack(in_place=True)
        self._fused = fused.FusedDecoder(model, most_keys, device)

    def prepare(self, batch: int, context: int) -> None:
        """Rows and a cache for so many sequences of `context` tokens."""
        blocks, self._long = -(-context // _BLOCK), context >= _LONG
        ints = functools.partial(torch.full, dtype=torch.int32, device=self._device)
        tokens = torch.randint(self.config.vocab_size, (batch,), device=self._device)
        tables = torch.randperm(batch * blocks, device=self._device).int()
        self._rows = DeviceRows(tokens, ints((batch,), -1), ints((batch,), context), tables, ints((1,), blocks))
        self._cache = KVCache(self.config, batch * blocks, _BLOCK, torch.bfloat16, self._device)
        for layer in self._cache.layers:
            layer.normal_()

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of one step in a graph, the median of some."""
        step = functools.partial(self._fused.step, self._rows, None, self._cache, long=self._long)
        return self._timer([step], 1).median * 1e-6

    def added(self, *wanted: str) -> dict[str, float]:
        """Seconds that each operation adds, in a layer, or once if it is the head. "rest": what no operation is.

        wanted: operations to measure; none: all that the step has.
        """
        with self.without(*OPERATIONS) as met:
            before = self.seconds()
        found, operations = {"rest": before}, [op for op in OPERATIONS if op in met]
        for number, op in enumerate(operations):
            if wanted and not {op, *operations[number + 1 : number + 2]} & {*wanted}:
                continue
            so_far = self._up_to(operations, number)
            found[op] = (so_far - before) / (1 if op == "head" else self.config.num_layers)
            before = so_far
        return {op: seconds for op, seconds in found.items() if op == "rest" or not wanted or op in wanted}

    def _up_to(self, operations: list[str], number: int) -> float:
        with self.without(*operations[number + 1 :]):
            return self.seconds()

    @contextmanager
    def without(self, *ops: str) -> Iterator[set[str]]:
        """A fused step with some operations gone. Leaves a set of those that were called."""
        linear, met = norm_linear.norm_linear, set[str]()
        shapes = {self._shape(name): name for name in ops if name in _PROJECTIONS}

        def project(*args: Any, **options: Any) -> None:
            name = shapes.get(tuple(args[1].shape))
            if name is None:
                linear(*args, **options)
            else:
                met.add(name)

        stubs: dict[tuple[ModuleType, str], Any] = {(norm_linear, "norm_linear"): project}
        for name in set(ops) - set(_PROJECTIONS):
            for module in (fused, fused_experts, fused_grouped):
                if hasattr(module, name):
                    stubs[module, name] = lambda *_, name=name, **__: met.add(name)
        originals = {(module, name): getattr(module, name) for module, name in stubs}
        _set(stubs)
        try:
            yield met
        finally:
            _set(originals)

    def _shape(self, projection: str) -> tuple[int, int]:
        c, a = self.config, self.config.attention
        return {
            "qkv": (c.qkv_size, c.hidden_size),
            "o": (c.hidden_size, a.num_heads * a.head_dim),
            "head": (c.vocab_size, c.hidden_size),
        }[projection]


def _set(functions: Mapping[tuple[ModuleType, str], Any]) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)
