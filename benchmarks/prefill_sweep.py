"""Other tiles for the large kernels of a prompt step, each timed alone in a CUDA graph. See `prefill.py`.

Enters: a ModelConfig and numbers of tokens. Leaves: a table for each kernel and number, and rows.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.bench.kernel_timer import time_launches
from flexmoe.config.model import ModelConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.prompt_rows import lay_out
from flexmoe.kernels.triton import expert_down, expert_gate_up, prefill_attention
from flexmoe.kernels.triton.expert_down import DownTile
from flexmoe.kernels.triton.expert_gate_up import GateUpTile
from flexmoe.kernels.triton.group_by_expert import group_by_expert
from flexmoe.kernels.triton.prefill_attention import PrefillAttentionTile
from flexmoe.models.hopper import hopper_kernels
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk

_DTYPE, _DEVICE, _BLOCK = torch.bfloat16, torch.device("cuda"), 16
# block_m, block_n, block_k, warps, stages
_GATE_UP = (
    (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4), (128, 64, 64, 4, 4),
    (128, 64, 64, 8, 4), (64, 64, 64, 4, 5), (256, 64, 64, 8, 3), (64, 128, 64, 4, 3),
)  # fmt: skip
_DOWN = (
    (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 4), (64, 256, 64, 8, 4), (64, 128, 64, 4, 4),
)  # fmt: skip
# rows, keys, warps, stages
_ATTENTION = (
    (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 5), (128, 128, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3),
    (64, 64, 4, 5), (64, 128, 4, 3), (64, 32, 4, 5),
)  # fmt: skip
_GROUPS = (0, 4, 8, 16, 32)
_TAILS = (32, 16, 64)


@dataclass(frozen=True)
class Candidate:
    """One way to compute one operation, by a launch that may be repeated."""

    op: str
    tile: Any
    launch: Callable[[], None]


class Layer:
    """One MoE layer's weights, and the inputs of T tokens."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.moe is not None
        self.config, self.moe = config, config.moe
        S, H, width = self.moe.num_experts, config.hidden_size, self.moe.expert_width
        self.gate_up, self.down = (
            torch.empty(shape, dtype=_DTYPE, device=_DEVICE).normal_(std=0.02)
            for shape in ((S, 2 * width, H), (S, H, width))
        )

    def prepare(self, tokens: int) -> None:
        """Uniform routing of so many tokens, and one prompt of them."""
        S, K, H, width = self.moe.num_experts, self.moe.top_k, self.config.hidden_size, self.moe.expert_width
        ids = torch.rand(tokens, S, device=_DEVICE).argsort(-1)[:, :K].int().contiguous()
        self.rows = torch.empty(S, tokens, dtype=torch.int32, device=_DEVICE)
        self.counts = torch.empty(S, dtype=torch.int32, device=_DEVICE)
        group_by_expert(ids, S, self.rows, self.counts)
        self.offsets = self.counts.cumsum(0, dtype=torch.int32)
        self.weights = torch.rand(tokens, K, device=_DEVICE)
        self.x, self.hidden, self.y = (
            torch.randn(n, w, device=_DEVICE).to(_DTYPE) for n, w in ((tokens, H), (tokens * K, width), (tokens * K, H))
        )
        a = self.config.attention
        self.query = torch.randn(tokens, a.num_heads * a.head_dim, device=_DEVICE).to(_DTYPE)
        blocks = -(-tokens // _BLOCK)
        self.cache = torch.randn(blocks * _BLOCK, 2, a.num_kv_heads, a.head_dim, device=_DEVICE).to(_DTYPE)
        request = Request("r", [1] * tokens, SamplingParams(), eos_token_ids=(), max_total_tokens=2**40)
        request.blocks = torch.randperm(blocks).tolist()
        self.chunk = ScheduledChunk(request, 0, tokens, True)
        shape = (tokens, K, S, H, width, _DTYPE)
        attention = prefill_attention.default_tile(a.head_dim, _DTYPE)
        self.defaults = (expert_gate_up.default_tile(*shape), expert_down.default_tile(*shape), attention)

    def candidate(self, tile: Any) -> Candidate:
        """With a tile of one of the three kernels."""
        if isinstance(tile, GateUpTile):
            launch = functools.partial(
                expert_gate_up.expert_gate_up_grouped, self.x, self.rows, self.counts, self.gate_up, self.hidden,
                top_k=self.moe.top_k, tile=tile,
            )  # fmt: skip
            return Candidate("gate_up", tile, launch)
        if isinstance(tile, DownTile):
            launch = functools.partial(
                expert_down.expert_down_grouped, self.hidden, self.rows, self.counts, self.weights, self.down, self.y,
                tile=tile,
            )  # fmt: skip
            return Candidate("down", tile, launch)
        spans = lay_out([self.chunk], _BLOCK, tile.rows, _DEVICE).spans
        out = torch.empty_like(self.query)
        launch = functools.partial(
            prefill_attention.prefill_attention, self.query, self.cache, spans, out, tile=tile
        )  # fmt: skip
        return Candidate("attention", tile, launch)

    def torch_products(self) -> Iterator[Candidate]:
        """The products alone in torch, of rows that lie in the experts' order already; no SwiGLU, no weights."""
        wide = torch.randn(len(self.y), self.config.hidden_size, device=_DEVICE).to(_DTYPE)
        for op, rows, weights in (("gate_up", wide, self.gate_up), ("down", self.hidden, self.down)):
            yield Candidate(op, "grouped_mm", functools.partial(_grouped_mm, rows, weights, self.offsets))

    def for_hopper(self) -> Iterator[Candidate]:
        """The kernels for Hopper, where this is one; the rows' own keys are as many as the last ones in the cache."""
        kernels, tile = hopper_kernels(_DEVICE, self.config, _DTYPE), "hopper"
        if (products := kernels.products) is not None:
            hidden = torch.empty_like(self.hidden)
            grouped, top_k = (self.rows, self.counts), self.moe.top_k
            first = functools.partial(products.gate_up, self.x, *grouped, self.gate_up, hidden, top_k=top_k)
            yield Candidate("gate_up", tile, first)
            second = functools.partial(products.down, self.hidden, *grouped, self.weights, self.down, self.y)
            yield Candidate("down", tile, second)
        if (attention := kernels.attention) is not None:
            spans = lay_out([self.chunk], _BLOCK, attention.rows, _DEVICE).spans
            fresh, out = self.cache[: len(self.query)].clone(), torch.empty_like(self.query)
            yield Candidate("attention", tile, functools.partial(attention, self.query, fresh, self.cache, spans, out))

    def flop(self, op: str) -> float:
        """Of one launch; for attention without what is masked."""
        H, width, T = self.config.hidden_size, self.moe.expert_width, len(self.x)
        if op == "attention":
            return 2.0 * self.query.numel() * (T + 1)
        return (4.0 if op == "gate_up" else 2.0) * len(self.y) * H * width


def _grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> None:
    F.grouped_mm(rows, weights.transpose(1, 2), offs=offsets)


def sweep(config: ModelConfig, counts: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of all that could be timed until the time was over, and a line for each; the best of a kernel last."""
    layer = Layer(config)
    for number, tokens in enumerate(counts):
        end = time.monotonic() + seconds / len(counts)
        layer.prepare(tokens)
        print(f"\nsweep of {tokens} tokens, number {number + 1} of {len(counts)}")
        first = [*layer.torch_products(), *layer.for_hopper(), *map(layer.candidate, _tiles(layer))]
        rows = list(_timed(layer, first, end))
        best = [_best(rows, op) for op in ("gate_up", "down")]
        second = dict.fromkeys(other for tile in best if tile for other in _around(tile))
        made = [row["made"] for row in rows]
        rows += _timed(layer, [layer.candidate(tile) for tile in second if tile not in made], end)
        for op in ("gate_up", "down", "attention"):
            same = sorted((row for row in rows if row["op"] == op), key=lambda row: float(row["us"]))
            others = [row for row in same[5:] if row["tile"] in ("grouped_mm", "hopper") or row["default"]]
            for row in same[:5] + others:
                print(f"  {op:9} {row['us']:9.1f} us {row['tflop_s']:6.0f} TFLOP/s  {row['tile']}")
        yield from ({"tokens": tokens} | {k: v for k, v in row.items() if k != "made"} for row in rows)


def _tiles(layer: Layer) -> Iterator[Any]:
    """The defaults, then all forms, with and without the tensor memory accelerator; the first two with a tail too."""
    tiles = [*layer.defaults, *(PrefillAttentionTile(*form) for form in _ATTENTION)]
    for tma in (False, True):
        for tail, forms in ((_TAILS[0], 2), (0, None)):
            tiles += [GateUpTile(*form, swap=False, tma=tma, group=16, tail=tail) for form in _GATE_UP[:forms]]
            tiles += [DownTile(*form, swap=False, tma=tma, group=8, tail=tail) for form in _DOWN[:forms]]
    yield from dict.fromkeys(tiles)


def _around(tile: Any) -> Iterator[Any]:
    """A tile of an expert's half with other tails, and with other groups."""
    for tail, tma, stages in itertools.product(_TAILS, (tile.tma, not tile.tma), (4, 3)):
        yield replace(tile, tail=tail, tma=tma, num_stages=stages)
    yield from (replace(tile, group=group) for group in _GROUPS)


def _timed(layer: Layer, candidates: Sequence[Candidate], end: float) -> Iterator[dict[str, Any]]:
    """Compiled in several threads by a launch each, then timed one after the other, while there is time."""
    failed: dict[int, str] = {}

    def compile_one(number: int) -> None:
        if time.monotonic() < end:
            try:
                candidates[number].launch()
            except Exception as error:  # noqa: BLE001 - whatever a candidate raises, the others shall run
                failed[number] = f"{type(error).__name__} {str(error).strip().splitlines()[:1]}"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, range(len(candidates))))
    torch.cuda.synchronize()
    for number, candidate in enumerate(candidates):
        if number in failed:
            print(f"  failed: {candidate.op} {candidate.tile}: {failed[number]}", flush=True)
        elif time.monotonic() < end + 5:
            us = time_launches([candidate.launch], 2).median
            made = candidate.tile
            yield {
                "op": candidate.op,
                "tile": made if isinstance(made, str) else asdict(made),
                "made": made,
                "us": round(us, 2),
                "tflop_s": round(layer.flop(candidate.op) / us / 1e6, 1),
                "default": made in layer.defaults,
            }


def _best(rows: Sequence[dict[str, Any]], op: str) -> Any:
    """The quickest tile of our own; None if nothing ran."""
    own = [row for row in rows if row["op"] == op and row["tile"] != "grouped_mm"]
    return min(own, key=lambda row: float(row["us"]))["made"] if own else None
