"""What the operations of a prompt take on a GPU, as an engine computes it. Enters: a ModelConfig. Leaves: seconds.

Some layers of a model with random weights go through `PromptDecoder`, the last one as whole as the others. An
operation's time is that of its kernels as the GPU's own clocks saw them; the step as a whole is timed with all of its
launches waiting on the device, as in a graph.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.prompt_rows import lay_out
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import PromptRows
from flexmoe.models.fused_prompts import PromptDecoder
from flexmoe.models.loader import fill_dummy
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.step import ScheduledChunk

_BLOCK = 16  # tokens of a KV block
_REPEATS = 7
_AHEAD = 24_000_000  # cycles, some 12 ms, that a GPU is kept busy while launches pile up
# A kernel of ours: what it is, and which product of torch's comes behind it.
_OURS = {
    "_begin_rows": ("norm", "qkv"), "_rotate_and_store": ("rotate", "qkv"),
    "_prefill_attention": ("attention", "output"), "prompt_attention": ("attention", "output"),
    "_route_many": ("router", "other"), "_topk": ("group", "other"), "_group_by_expert": ("group", "other"),
    "_gate_up_grouped": ("gate_up", "other"), "_down_grouped": ("down", "other"),
    "expert_gate_up_products": ("gate_up", "other"), "expert_down_products": ("down", "other"),
    "expert_gate_up_products_wide": ("gate_up", "other"), "expert_down_products_wide": ("down", "other"),
    "expert_down_products_square": ("down", "other"),
}  # fmt: skip


class PromptLayers:
    """Some layers of a model with random weights, and one prompt at a time."""

    def __init__(self, config: ModelConfig, most: int, device: torch.device, dtype: torch.dtype) -> None:
        """most: tokens of a prompt with those before it."""
        self.config, self._device = config, device
        model = Decoder(config, ParallelPlan(), "triton", most, dtype=dtype, device=device).eval()
        fill_dummy({name: p.data for name, p in model.named_parameters()}, 0, dtype)
        model.pack(in_place=True)
        self._decoder = PromptDecoder(model, most, device, whole=True)
        # No kernel begins before the last one has ended.
        self._apart = PromptDecoder(model, most, device, pdl=False, whole=True)
        self._cache = KVCache(config, -(-most // _BLOCK), _BLOCK, dtype, device)
        for layer in self._cache.layers:
            layer.normal_()

    def rows(self, tokens: int, before: int = 0) -> PromptRows:
        """One prompt behind `before` tokens of its own, in blocks that lie anywhere."""
        ids = torch.randint(self.config.vocab_size, (before + tokens,)).tolist()
        request = Request("r", ids, SamplingParams(), eos_token_ids=(), max_total_tokens=2**40)
        request.blocks = torch.randperm(-(-len(ids) // _BLOCK)).tolist()
        return lay_out([ScheduledChunk(request, before, tokens, True)], _BLOCK, self._decoder.block_rows, self._device)

    @torch.inference_mode()
    def step(self, rows: PromptRows) -> Tensor:
        """Launches it; waits for nothing. Returns the logits of the last row [1, V]."""
        return self._decoder.logits(rows, self._cache)

    def seconds(self, rows: PromptRows, *, ahead: bool = False) -> tuple[float, float]:
        """Medians of a step: on the device, and of the host's part in it. ahead: the device waits for all launches."""
        device, host = [], []
        for _ in range(_REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if ahead:
                torch.cuda._sleep(_AHEAD)
            began = time.perf_counter()
            start.record()
            self.step(rows)
            end.record()
            host.append(time.perf_counter() - began)
            end.synchronize()
            device.append(start.elapsed_time(end) / 1e3)
        return statistics.median(device), statistics.median(host)

    def operations(self, rows: PromptRows) -> tuple[dict[str, float], int]:
        """Seconds of each operation in a step, all layers together, and launches."""
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as seen:
            self._apart.logits(rows, self._cache)
            torch.cuda.synchronize()
        events = sorted((e for e in seen.events() if e.device_time_total > 0), key=lambda e: e.time_range.start)
        return named((e.name, e.device_time_total * 1e-6) for e in events), len(events)

    def parts(self, tokens: int, before: int = 0) -> dict[str, float]:
        """Seconds of a layer's operations; "head" of the step's end, "host" of a layer's launches."""
        rows = self.rows(tokens, before)
        self.step(rows)  # compiles
        whole, launching = self.seconds(rows, ahead=True)
        return split(whole, launching, self.operations(rows)[0], self.config.num_layers)


def split(whole: float, launching: float, operations: dict[str, float], layers: int) -> dict[str, float]:
    """A step's seconds by what the planner prices: what a layer has beside the named operations is its "router"."""
    head = operations.get("head", 0.0)
    each = {name: operations.get(name, 0.0) / layers for name in ("qkv", "output", "attention")}
    each["experts"] = (operations.get("gate_up", 0.0) + operations.get("down", 0.0)) / layers
    rest = (whole - head) / layers - sum(each.values())
    return each | {"router": rest, "head": head, "host": launching / layers}


def named(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Seconds by operation of kernels in their order: torch's are told apart by what came before them."""
    found: dict[str, float] = defaultdict(float)
    kernels, product, last = list(kernels), "other", ""
    final = max((i for i, (name, _) in enumerate(kernels) if name.startswith("_combine")), default=-1)
    for i, (name, seconds) in enumerate(kernels):
        if name.startswith("_combine"):
            operation, product = "norm", "head" if i == final else "other" if last == "output" else "qkv"
        elif name in _OURS:
            operation, product = _OURS[name]
        else:
            operation = product
        found[operation] += seconds
        last = operation
    return found
