"""Tiles where they matter: a decode step's graph with one operation's tile changed, or the operation left out.

    python benchmarks/step_variants.py MODEL --batch 1,8 [--ops REGEX] [--out rows.jsonl]
    python benchmarks/step_variants.py MODEL --compile-part 3/14    # fill the compiler's cache, time nothing

Kernels of a step start before the one ahead of them has ended, so what one costs is not what it takes alone. Here a
few layers of the model run as in the engine; a variant's figure is the step's time less that of the unchanged step,
divided by the layers. Left out, an operation shows what there is to win at most.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexmoe.bench.record import append, facts
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.kernels.triton.decode_attention import DecodeAttentionTile
from flexmoe.kernels.triton.expert_down import DownGemvTile, DownTile
from flexmoe.kernels.triton.expert_down import default_gemv_tile as down_tile
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.expert_gate_up import default_gemv_tile as gate_up_tile
from flexmoe.kernels.triton.norm_linear import DirectTile, DotTile, GemvTile
from flexmoe.kernels.triton.route import RouteTile
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models import fused
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import DeviceRows
from flexmoe.models.loader import fill_dummy
from flexmoe.models.presets import PRESETS

_DEVICE = torch.device("cuda")
_CONTEXT, _BLOCK = 192, 16
_REPLAYS = 15


@dataclass(frozen=True)
class Variant:
    """op: its name in models/fused.py, for projections with "qkv", "o" or "head"; tile None leaves it out."""

    op: str
    tile: Any

    def __str__(self) -> str:
        return f"{self.op} {'left out' if self.tile is None else self.tile}"


def variants(config: ModelConfig, batch: int) -> Iterator[Variant]:
    """Every operation left out, and the likeliest tiles of each."""
    few = batch <= 4
    experts = ("expert_gate_up_gemv", "expert_down_gemv") if few else ("expert_gate_up_grouped", "expert_down_grouped")
    glue = () if few else ("topk", "group_by_expert", "combine")
    for op in ("qkv", "o", "head", "decode_attention", "route", *experts, *glue):
        yield Variant(op, None)
    if few:
        yield from (Variant("early", pair) for pair in _early(config))
    yield from _experts(config, batch, *experts)
    yield from (Variant("decode_attention", tile) for tile in _attention(config, batch))
    yield from (Variant("route", tile) for tile in _route(batch))
    for op in ("qkv", "o", "head"):
        yield from (Variant(op, tile) for tile in _projections(op, batch))


def _experts(config: ModelConfig, batch: int, up: str, down: str) -> Iterator[Variant]:
    if batch <= 4:
        wide = config.hidden_size > 2048
        for columns in (2048, 4096) if wide else (1024, 2048):
            for pairs, steps, warps in (
                (1, 1, 1),
                (1, 1, 2),
                (1, 1, 4),
                (1, 2, 1),
                (1, 2, 2),
                (1, 2, 4),
                (2, 1, 2),
                (2, 2, 2),
            ):
                yield Variant(up, GateUpGemvTile(pairs, columns, steps, warps))
        for outputs, columns, warps in ((2, 1024, 8), (2, 1024, 4), (2, 512, 8), (2, 512, 4), (1, 1024, 8), (1, 512, 8),
                                        (4, 256, 4), (4, 256, 8), (4, 512, 8), (2, 2048, 8), (2, 2048, 4), (4, 1024, 4)):  # fmt: skip
            yield Variant(down, DownGemvTile(outputs, columns, warps))
        return
    for m, n, k, stages in ((16, 32, 128, 4), (16, 64, 128, 3), (16, 64, 128, 4), (16, 64, 64, 5), (32, 64, 64, 5),
                            (32, 128, 64, 5), (16, 128, 64, 6), (64, 64, 128, 4), (32, 64, 128, 4)):  # fmt: skip
        for swap in (False, True):
            yield Variant(up, GateUpTile(m, n, k, 4, stages, swap))
    for m, n, k, stages in ((16, 64, 64, 4), (16, 64, 128, 3), (16, 64, 128, 4), (16, 128, 64, 5), (32, 128, 64, 5),
                            (16, 128, 128, 4), (32, 64, 64, 5), (64, 128, 128, 4), (64, 64, 64, 4)):  # fmt: skip
        for swap in (False, True):
            yield Variant(down, DownTile(m, n, k, 4, stages, swap))


def _early(config: ModelConfig) -> Iterator[tuple[GateUpGemvTile, DownGemvTile]]:
    """Both halves of the experts, the second asking for weights before the first has ended."""
    assert config.moe is not None
    hidden, moe, dtype = config.hidden_size, config.moe, torch.bfloat16
    first, second = gate_up_tile(hidden, dtype), down_tile(moe.top_k, moe.expert_width, dtype)
    yield replace(first, late_trigger=True), second
    yield replace(first, late_trigger=True), replace(second, early_ids=True)


def _attention(config: ModelConfig, batch: int) -> Iterator[DecodeAttentionTile]:
    alone = config.attention.num_heads == config.attention.num_kv_heads
    for keys, warps, stages in ((16, 2, 1), (16, 4, 1), (32, 4, 1), (32, 8, 1)):
        for splits in (1, 4, 16) if batch <= 8 else (1, 2, 4):
            for per_head in (True,) if alone else (False, True) if batch <= 8 else (False,):
                yield DecodeAttentionTile(keys, warps, stages, splits, max(keys, 32), per_head)


def _route(batch: int) -> Iterator[RouteTile]:
    for experts in (1, 2, 4):
        for warps in (4, 8):
            yield RouteTile(1, experts, 0, warps, 1)
    if batch >= 16:
        yield RouteTile(16, 16, 128, 2, 3)
        yield RouteTile(16, 16, 256, 2, 3)
        yield RouteTile(32, 32, 128, 4, 3)


def _projections(op: str, batch: int) -> Iterator[GemvTile | DirectTile | DotTile]:
    if batch <= 4:
        for lanes, warps_n, warps_k, rows, ahead in (
            (4, 1, 8, 2, 4),
            (4, 4, 1, 2, 8),
            (8, 1, 8, 1, 8),
            (4, 2, 4, 1, 8),
        ):
            yield GemvTile(lanes, warps_n, warps_k, rows, ahead, 2)
    if batch <= 32:
        for warps_n, warps_k, rows, ahead in (
            (1, 4, 1, 8),
            (1, 8, 1, 8),
            (1, 8, 1, 4),
            (1, 16, 1, 8),
            (2, 4, 1, 8),
            (1, 4, 2, 4),
        ):
            for prefetch in (0,) if op == "head" else (0, 2048):
                for fuse in (True, False) if op == "qkv" and batch <= 8 else (batch <= 4,):
                    yield DirectTile(warps_n, warps_k, rows, ahead, 4, prefetch=prefetch, fuse_norm=fuse)
    if batch >= 16:
        block_t = min(128, max(16, batch))
        for n, k, splits, warps, stages in ((64, 128, 1, 4, 4), (64, 128, 2, 4, 4), (64, 64, 2, 4, 4), (64, 64, 4, 4, 5),
                                            (32, 128, 1, 4, 4), (32, 128, 2, 4, 4), (32, 64, 1, 4, 6), (128, 64, 4, 8, 4),
                                            (16, 128, 1, 4, 4), (16, 256, 1, 4, 3)):  # fmt: skip
            yield DotTile(block_t, n, k, splits, warps, stages)


class Steps:
    """Some layers of a model, and rows of equal length, as a decode step finds them."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.model = Decoder(config, ParallelPlan(), "reference", 512, dtype=torch.bfloat16, device=_DEVICE).eval()
        fill_dummy({name: p.data for name, p in self.model.named_parameters()}, 0, torch.bfloat16)
        self.model.pack(in_place=True)
        self.fused = fused.FusedDecoder(self.model, 512, _DEVICE)
        buffers = self.fused._buffers
        buffers.scratch = torch.empty(1 << 28, dtype=torch.uint8, device=_DEVICE)
        a = config.attention
        rows = fused.MAX_ROWS
        buffers.attention = (torch.empty(rows * a.num_heads * 16 * a.head_dim, device=_DEVICE),
                             torch.empty(rows * a.num_heads * 16, device=_DEVICE))  # fmt: skip

    def prepare(self, batch: int) -> None:
        """Rows and a cache for so many sequences of `_CONTEXT` tokens."""
        blocks = -(-_CONTEXT // _BLOCK)
        ints = functools.partial(torch.full, dtype=torch.int32, device=_DEVICE)
        tokens = torch.randint(self.config.vocab_size, (batch,), device=_DEVICE)
        tables = torch.randperm(batch * blocks, device=_DEVICE).int()
        self.rows = DeviceRows(tokens, ints((batch,), -1), ints((batch,), _CONTEXT), tables, ints((1,), blocks))
        self.cache = KVCache(self.config, batch * blocks, _BLOCK, torch.bfloat16, _DEVICE)
        for layer in self.cache.layers:
            layer.normal_()

    @torch.inference_mode()
    def run(self) -> None:
        """One step, eagerly."""
        self.fused.step(self.rows, None, self.cache)

    @torch.inference_mode()
    def seconds(self) -> float:
        """Of one step in a graph."""
        self.run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
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
def changed(steps: Steps, variant: Variant) -> Iterator[None]:
    """models/fused.py with one operation's tile set, or the operation gone."""
    if variant.op == "early":
        steps.fused._tiles.few_experts = lambda _rows: variant.tile  # type: ignore[method-assign]
        try:
            yield
        finally:
            del steps.fused._tiles.few_experts
        return
    projection = variant.op in ("qkv", "o", "head")
    place, name = (fused.norm_linear, "norm_linear") if projection else (fused, variant.op)
    original: Callable[..., None] = getattr(place, name)
    config, attention = steps.config, steps.config.attention
    shapes = {
        "qkv": (config.qkv_size, config.hidden_size),
        "o": (config.hidden_size, attention.num_heads * attention.head_dim),
        "head": (config.vocab_size, config.hidden_size),
    }

    def replaced(*args: Any, **options: Any) -> None:
        if projection and tuple(args[1].shape) != shapes[variant.op]:
            original(*args, **options)
        elif variant.tile is not None:
            original(*args, **options | {"tile": variant.tile})

    setattr(place, name, replaced)
    try:
        yield
    finally:
        setattr(place, name, original)


def main() -> None:
    """Compile a part of the variants, or time them all."""
    args = _arguments()
    preset = PRESETS[args.model].config
    layers = 1 if args.compile_part else args.layers
    steps = Steps(_cut(preset, layers))
    for batch in (int(part) for part in args.batch.split(",")):
        steps.prepare(batch)
        wanted = [v for v in variants(preset, batch) if re.search(args.ops, str(v))]
        if args.compile_part:
            part, parts = (int(number) for number in args.compile_part.split("/"))
            for variant in wanted[part::parts]:
                _attempt(steps, variant, steps.run)
        else:
            _time(args, steps, batch, wanted)


def _time(args: argparse.Namespace, steps: Steps, batch: int, wanted: list[Variant]) -> None:
    base = min(steps.seconds() for _ in range(3))
    layers = steps.config.num_layers
    found = []
    for variant in wanted:
        seconds = _attempt(steps, variant, steps.seconds)
        if seconds is not None:
            found.append(((seconds - base) * 1e6 / (1 if variant.op == "head" else layers), variant))
    print(
        f"\n{args.model}, batch {batch}: {base * 1e6:.1f} us a step of {layers} layers; change in us a layer (or head)"
    )
    for op in dict.fromkeys(variant.op for _, variant in found):
        mine = sorted((pair for pair in found if pair[1].op == op), key=lambda pair: pair[0])
        for change, variant in [pair for pair in mine if pair[1].tile is None] + mine[: args.top]:
            print(f"  {change:8.2f}  {variant}")
    if args.out:
        shared = facts(_DEVICE) | {"benchmark": "step_variants", "model": args.model, "batch": batch, "layers": layers}
        for change, variant in found:
            tile = (
                {"kind": type(variant.tile).__name__, **asdict(variant.tile)}
                if is_dataclass(variant.tile)
                else str(variant.tile)
            )
            append(args.out, shared | {"base_us": base * 1e6, "op": variant.op, "tile": tile, "change_us": change})


def _attempt(steps: Steps, variant: Variant, work: Callable[[], Any]) -> Any:
    try:
        with changed(steps, variant):
            return work()
    except Exception as error:  # noqa: BLE001 - a tile may be too large for the device; the others shall run
        print(f"failed: {variant}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None


def _cut(config: ModelConfig, layers: int) -> ModelConfig:
    return replace(config, layers=config.layers[:layers])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--batch", default="1")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ops", default="", help="variants in whose text this regular expression is found")
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--compile-part", help="i/n: compile every n-th variant from the i-th on, and time nothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
