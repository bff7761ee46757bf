"""What each operation costs inside a decode step: the step's graph with it left out, and with all after it left out.

    python benchmarks/step_costs.py MODEL --batch 1,8 [--layers 6] [--out rows.jsonl]

Kernels of a step start before the one ahead of them has ended, so what one costs is not what it takes alone, and a
profile counts overlaps twice. Here a few layers of a preset run as in the engine, with random weights. An operation's
first figure is the step's time less that of the step without it, divided by the layers; without the router's part of a
step other experts are chosen, so there it says nothing. The second is what it adds to the operations before it, when
none come after: there the parts of a chain of short operations show. `flexmoe tune` judges tiles in the same way.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexmoe.bench.record import append, facts
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models import fused
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows
from flexmoe.models.loader import fill_dummy
from flexmoe.models.presets import PRESETS

_DEVICE = torch.device("cuda")
_CONTEXT, _BLOCK = 192, 16
_REPLAYS = 15
_PROJECTIONS = ("qkv", "o", "head")
_OPERATIONS = (  # as they come in a step
    "qkv", "decode_attention", "o", "route", "topk", "group_by_expert", "topk_by_expert", "expert_gate_up_gemv",
    "expert_down_gemv", "expert_gate_up_grouped", "expert_down_grouped", "combine", "combine_norm", "head",
)  # fmt: skip


class Steps:
    """Some layers of a model, and rows of equal length, as a decode step finds them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        model = Decoder(config, ParallelPlan(), "reference", 512, dtype=torch.bfloat16, device=_DEVICE).eval()
        fill_dummy({name: p.data for name, p in model.named_parameters()}, 0, torch.bfloat16)
        model.pack(in_place=True)
        self._fused = fused.FusedDecoder(model, 512, _DEVICE)

    def prepare(self, batch: int) -> None:
        """Rows and a cache for so many sequences of `_CONTEXT` tokens."""
        blocks = -(-_CONTEXT // _BLOCK)
        ints = functools.partial(torch.full, dtype=torch.int32, device=_DEVICE)
        tokens = torch.randint(self.config.vocab_size, (batch,), device=_DEVICE)
        tables = torch.randperm(batch * blocks, device=_DEVICE).int()
        self._rows = DeviceRows(tokens, ints((batch,), -1), ints((batch,), _CONTEXT), tables, ints((1,), blocks))
        self._cache = KVCache(self.config, batch * blocks, _BLOCK, torch.bfloat16, _DEVICE)
        for layer in self._cache.layers:
            layer.normal_()

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of one step in a graph, the median of some."""
        self._fused.step(self._rows, None, self._cache)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._fused.step(self._rows, None, self._cache)
        times = []
        for _ in range(_REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return statistics.median(times[3:])

    @contextmanager
    def without(self, *ops: str) -> Iterator[set[str]]:
        """models/fused.py with some operations gone. Leaves a set of those that were called."""
        originals = {name: getattr(fused, name) for name in ops if name not in _PROJECTIONS}
        linear, met = fused.norm_linear.norm_linear, set()
        shapes = {self._shape(name): name for name in ops if name in _PROJECTIONS}

        def project(*args: Any, **options: Any) -> None:
            name = shapes.get(tuple(args[1].shape))
            if name is None:
                linear(*args, **options)
            else:
                met.add(name)

        fused.norm_linear.norm_linear = project
        for name in originals:
            setattr(fused, name, lambda *_, name=name, **__: met.add(name))
        try:
            yield met
        finally:
            fused.norm_linear.norm_linear = linear
            for name, original in originals.items():
                setattr(fused, name, original)

    def _shape(self, projection: str) -> tuple[int, int]:
        c, a = self.config, self.config.attention
        return {
            "qkv": (c.qkv_size, c.hidden_size),
            "o": (c.hidden_size, a.num_heads * a.head_dim),
            "head": (c.vocab_size, c.hidden_size),
        }[projection]


def main() -> None:
    """Time the step of each batch, whole and without each operation that it has."""
    args = _arguments()
    preset = PRESETS[args.model].config
    steps = Steps(replace(preset, layers=preset.layers[: args.layers]))
    for batch in (int(part) for part in args.batch.split(",")):
        steps.prepare(batch)
        whole = min(steps.seconds() for _ in range(3))
        print(
            f"\n{args.model}, batch {batch}: {whole * 1e6:.1f} us a step of {args.layers} layers; us a layer (or head)"
        )
        with steps.without(*_OPERATIONS) as met:
            before = steps.seconds()
        operations = [op for op in _OPERATIONS if op in met]
        for number, op in enumerate(operations):
            each = 1 if op == "head" else args.layers
            with steps.without(op):
                cost = (whole - steps.seconds()) * 1e6 / each
            with steps.without(*operations[number + 1 :]):
                so_far = steps.seconds()
            added, before = (so_far - before) * 1e6 / each, so_far
            print(f"  {cost:8.2f} {added:8.2f}  {op}", flush=True)
            if args.out:
                shared = facts(_DEVICE) | {"benchmark": "step_costs", "model": args.model, "layers": args.layers}
                costs = {"cost_us": cost, "added_us": added}
                append(args.out, shared | {"batch": batch, "step_us": whole * 1e6, "op": op} | costs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
