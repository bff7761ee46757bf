"""What each operation costs inside a decode step: the step's graph with that operation left out.

    python benchmarks/step_costs.py MODEL --batch 1,8 [--layers 6] [--out rows.jsonl]

Kernels of a step start before the one ahead of them has ended, so what one costs is not what it takes alone, and a
profile counts overlaps twice. Here a few layers of a preset run as in the engine, with random weights; an operation's
figure is the step's time less that of the step without it, divided by the layers. Tiles are tuned in the same way by
`flexmoe tune`.
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
_OPERATIONS = (
    *_PROJECTIONS, "decode_attention", "route", "topk", "group_by_expert", "topk_by_expert", "expert_gate_up_gemv",
    "expert_down_gemv", "expert_gate_up_grouped", "expert_down_grouped", "combine",
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
    def without(self, op: str) -> Iterator[list[int]]:
        """models/fused.py with one operation gone. Leaves a list with an entry for each time it was left out."""
        place, name = (fused.norm_linear, "norm_linear") if op in _PROJECTIONS else (fused, op)
        original, left_out = getattr(place, name), []

        def replaced(*args: Any, **options: Any) -> None:
            if op in _PROJECTIONS and tuple(args[1].shape) != self._shape(op):
                original(*args, **options)
            else:
                left_out.append(1)

        setattr(place, name, replaced)
        try:
            yield left_out
        finally:
            setattr(place, name, original)

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
        for op in _OPERATIONS:
            with steps.without(op) as left_out:
                rest = steps.seconds()
            if not left_out:
                continue
            cost = (whole - rest) * 1e6 / (1 if op == "head" else args.layers)
            print(f"  {cost:8.2f}  {op}", flush=True)
            if args.out:
                shared = facts(_DEVICE) | {"benchmark": "step_costs", "model": args.model, "layers": args.layers}
                append(args.out, shared | {"batch": batch, "step_us": whole * 1e6, "op": op, "cost_us": cost})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
