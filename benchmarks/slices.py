"""One rank's share of a MoE layer, run alone on one GPU: what a planner must know of ranks that are not there.

    python benchmarks/slices.py MODEL [--degrees 1,2,4,8] [--batch 1,8,32,128,512] [--out rows.jsonl]

For tensor and expert strategies the first rank's experts, or slices, are made with random weights, and no more; the
other ranks are only imagined, nothing is sent. Rows choose experts at random, all as likely; of the expert
strategy the rank that got most of them is taken, for which the others would wait. Microseconds of a layer:

    block     the MoE layer as ranks run it: router, choices of other ranks' experts left out, grouped experts, combine
    grouped   of that the experts alone
    alone     the kernels that read an expert for each row by itself, as one process decodes a few rows

Each is replayed in a CUDA graph, on as many sets of weights as no cache holds. An all-to-all computes the same pairs of
rows and experts. A row is one JSON line.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.bench.kernel_timer import Launch, time_launches
from flexmoe.bench.record import append, facts
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.models.presets import PRESETS
from flexmoe.moe.block import MoEBlock
from flexmoe.moe.dispatch import Routed
from flexmoe.parallel.mesh import Mesh

_CACHE = 160 * 10**6  # bytes, more than three times an H200's L2
_MOST_SETS = 16
_MOST_ALONE = 8  # rows; with more, reading an expert for each row alone has not won
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Share:
    """What the first rank holds: so many slots, each so wide. experts: of the whole layer."""

    strategy: str
    degree: int
    plan: ParallelPlan
    slots: int
    width: int
    experts: int

    def weight_bytes(self, config: ModelConfig, itemsize: int) -> int:
        """Of all its experts: gate, up and down."""
        return self.slots * 3 * self.width * config.hidden_size * itemsize


def shares(config: ModelConfig, degrees: Sequence[int]) -> Iterator[Share]:
    """Tensor and expert at each degree that fits; one rank is both, and comes once."""
    assert config.moe is not None
    moe = config.moe
    for degree in degrees:
        if moe.expert_width % degree == 0:
            yield _share("tensor", config, degree, ParallelPlan(degree))
        if 1 < degree <= moe.num_experts:
            yield _share("expert", config, degree, ParallelPlan(degree, degree))


def _share(strategy: str, config: ModelConfig, degree: int, plan: ParallelPlan) -> Share:
    assert config.moe is not None
    shard = Mesh(plan).shard(config)
    layer = moe_layer(config)
    return Share(strategy, degree, plan, len(shard.slots(layer)), len(shard.expert_width), config.moe.num_experts)


def moe_layer(config: ModelConfig) -> int:
    """The first layer with experts."""
    return next(index for index, layer in enumerate(config.layers) if layer.is_moe)


def num_sets(share: Share, config: ModelConfig, batch: int, itemsize: int) -> int:
    """Sets of weights to rotate, so that what a launch reads is no longer in a cache when its turn comes again."""
    read = share.weight_bytes(config, itemsize) * touched(share, config, batch) / max(1, share.slots)
    return max(2, min(_MOST_SETS, -(-_CACHE // max(1, int(read)))))


def touched(share: Share, config: ModelConfig, batch: int) -> float:
    """How many of its experts a batch is expected to choose."""
    assert config.moe is not None
    return share.slots * (1 - (1 - config.moe.top_k / share.experts) ** batch)


def choose(config: ModelConfig, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random choices [T, K] int64, each expert once a row, and their weights [T, K]."""
    assert config.moe is not None
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(batch, config.moe.num_experts, generator=generator).topk(config.moe.top_k).indices
    weights = torch.rand(batch, config.moe.top_k, generator=generator).softmax(-1)
    return ids.to(device), weights.to(device)


def busiest_first(ids: Tensor, share: Share) -> Tensor:
    """The choices with experts renamed, so that the rank of the expert strategy with most of them is the first."""
    if share.plan.expert_parallel_size == 1:
        return ids
    starts = [slots[0] for slots in share.plan.placement(share.experts).slots]
    rank = torch.bucketize(ids, torch.tensor(starts[1:], device=ids.device), right=True)
    start = starts[int(torch.bincount(rank.flatten(), minlength=len(starts)).argmax())]
    return (ids - start) % share.experts


class Routing(nn.Module):
    """A router that computes as ever and answers with given choices: random weights choose no even ones."""

    def __init__(self, router: nn.Module, ids: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.router, self.ids, self.weights = router, ids, weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.router(x)
        return self.ids, self.weights


def make_block(config: ModelConfig, share: Share, backend: str, dtype: torch.dtype, device: torch.device) -> MoEBlock:
    """The layer of the first rank with random weights, shared expert left out: it is a dense feed-forward."""
    assert config.moe is not None
    mesh = Mesh(share.plan)
    local, layer = mesh.shard(config).local, moe_layer(config)
    placement = share.plan.placement(config.moe.num_experts, layer)
    block = MoEBlock(local, layer, placement, backend, dtype=dtype, device=device, mesh=mesh)
    block.shared = block.shared_gate = None
    for parameter in block.parameters():
        parameter.data.normal_(std=0.02)
    block.experts.pack(prepack=False)
    return block


class Layer:
    """One share and one batch: its sets of weights, and what can be timed of them."""

    def __init__(self, config: ModelConfig, share: Share, batch: int, blocks: Sequence[MoEBlock], x: Tensor) -> None:
        """x [T, H]. blocks: one for each set of weights."""
        self.config, self.share, self.batch, self.x = config, share, batch, x
        self.blocks = blocks
        ids, self.weights = choose(config, batch, x.device)
        self.ids = busiest_first(ids, share)

    def routed(self) -> Routed:
        """The rows as the backend gets them: choices of other ranks' experts are -1."""
        return self.blocks[0].dispatcher.dispatch(self.x, self.ids, self.weights)

    def block(self) -> list[Callable[[], Tensor]]:
        """The whole layer."""
        for block in self.blocks:
            router = block.router.router if isinstance(block.router, Routing) else block.router
            block.router = Routing(router, self.ids, self.weights)  # type: ignore[assignment]
        return [functools.partial(block, self.x) for block in self.blocks]

    def grouped(self) -> list[Callable[[], Tensor]]:
        """The backend alone."""
        routed = self.routed()
        return [functools.partial(b.experts, routed.x, routed.slot_ids, routed.weights) for b in self.blocks]

    def alone(self) -> list[Launch]:
        """The kernels for few rows, their experts chosen before."""
        from flexmoe.kernels.triton import expert_down, expert_gate_up  # triton, without which the rest can be tested

        routed, width = self.routed(), self.share.width
        x, ids, weights, K = routed.x, routed.slot_ids.int(), routed.weights, routed.slot_ids.shape[1]
        hidden = torch.empty(len(x) * K, width, dtype=x.dtype, device=x.device)
        self.added = torch.zeros(*x.shape, device=x.device)
        tile = replace(expert_down.default_gemv_tile(K, width, x.dtype), early_ids=False)

        def run(gate_up: Tensor, down: Tensor) -> None:
            expert_gate_up.expert_gate_up_gemv(x, None, ids, weights, gate_up, hidden)
            expert_down.expert_down_gemv(hidden, ids, weights, down, self.added, tile=tile)

        return [functools.partial(run, b.experts.gate_up.data, b.experts.down.data) for b in self.blocks]

    def facts(self) -> dict[str, int]:
        """Of this batch's choices: pairs of a row and an expert that are here, and experts that are in one."""
        slots = self.routed().slot_ids
        here = slots[slots >= 0]
        return {"pairs": here.numel(), "active_experts": here.unique().numel()}


@torch.inference_mode()
def measure(
    config: ModelConfig, share: Share, batches: Sequence[int], device: torch.device
) -> Iterator[dict[str, Any]]:
    """What each batch takes; weights are made once for all."""
    count = max(num_sets(share, config, batch, _DTYPE.itemsize) for batch in batches)
    room = torch.cuda.mem_get_info(device)[0] // 2 // max(1, share.weight_bytes(config, _DTYPE.itemsize))
    blocks = [make_block(config, share, "triton", _DTYPE, device) for _ in range(max(1, min(count, room)))]
    for batch in batches:
        x = torch.randn(batch, config.hidden_size, device=device).to(_DTYPE)
        layer = Layer(config, share, batch, blocks, x)
        result: dict[str, Any] = dict(layer.facts())
        ways = {"block": layer.block, "grouped": layer.grouped, "alone": layer.alone}
        if batch > _MOST_ALONE:
            del ways["alone"]
        for name, make in ways.items():
            try:
                result[name] = {key: round(us, 3) for key, us in asdict(time_launches(list(make()))).items()}
            except Exception as error:  # noqa: BLE001 - a share that a kernel cannot compute is part of the answer
                result[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        yield {"batch": batch, "sets": len(blocks)} | result


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    numbers = _numbers
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=sorted(PRESETS))
    parser.add_argument("--degrees", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32, 128, 512])
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and append rows."""
    args = arguments(words)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/slices.py times kernels on an NVIDIA GPU, and torch finds none here.")
    config, device = PRESETS[args.model].config, torch.device("cuda")
    shared = facts(device) | {"benchmark": "slices", "model": args.model, "dtype": str(_DTYPE).removeprefix("torch.")}
    for share in shares(config, args.degrees):
        about = {key: value for key, value in asdict(share).items() if key != "plan"}
        about["weight_bytes"] = share.weight_bytes(config, _DTYPE.itemsize)
        for result in measure(config, share, args.batch, device):
            times = ", ".join(f"{k} {v.get('median', 'failed')}" for k, v in result.items() if isinstance(v, dict))
            print(f"{args.model}, {share.strategy} {share.degree}, batch {result['batch']}: us {times}", flush=True)
            if args.out:
                append(args.out, shared | about | result)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
