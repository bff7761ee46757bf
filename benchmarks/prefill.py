"""How long a step of prompt tokens takes on a GPU, and each operation's share of it and of what the card can do.

    python benchmarks/prefill.py olmoe-1b-7b,qwen3-30b-a3b,mixtral-8x7b [--tokens 512,2048,8192] [--layers 8]
                                 [--sweep [SECONDS]] [--out rows.jsonl]

Enters: presets. Leaves: tables, and JSON rows. A step is one prompt of T tokens through `PromptDecoder`, with random
weights and some layers of the model; "whole" counts them up to all. An operation's time is that of its kernels as the
GPU's own clocks saw it. Its floor is the longer of two: its products at the rate of an 8192 x 8192 x 8192 product of
torch, and the bytes that it must move at the rate of a plain read. `--sweep` times other tiles of the three large
Triton kernels, and `torch.nn.functional.grouped_mm`, each alone, for so many seconds a model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prefill_sweep import sweep

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.peak import matrix_peak
from flexmoe.bench.prompt_operations import PromptLayers
from flexmoe.bench.record import append, facts
from flexmoe.config.model import ModelConfig
from flexmoe.models.presets import PRESETS

_DEVICE, _DTYPE = torch.device("cuda"), torch.bfloat16


@dataclass(frozen=True)
class Ceiling:
    """FLOP/s and bytes/s that plain operations reached on this card."""

    product: float
    read: float


@dataclass(frozen=True)
class Work:
    """FLOP and bytes of one operation in a step, at least."""

    flop: float
    bytes: float

    def floor(self, ceiling: Ceiling) -> float:
        """Seconds."""
        return max(self.flop / ceiling.product, self.bytes / ceiling.read)


def work_of(config: ModelConfig, tokens: int) -> dict[str, Work]:
    """Of each operation of a layer, and of the head; uniform routing."""
    a, moe, H, T = config.attention, config.moe, config.hidden_size, tokens
    assert moe is not None
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    F, rows, active = moe.expert_width, T * moe.top_k, moe.expected_experts(T)

    def product(rows: float, n: int, k: int, read: float = 1.0) -> Work:
        return Work(2 * rows * n * k, 2 * (read * n * k + rows * (n + k)))

    experts = product(rows, 2 * F, H, active)
    return {
        "qkv": product(T, q + 2 * kv, H),
        "rotate": Work(0, 2 * T * 2 * (q + 2 * kv)),
        "attention": Work(4 * q * T * (T + 1) / 2, 2 * T * 2 * (q + kv)),
        "output": product(T, H, q),
        "router": product(T, moe.num_experts, H),
        "group": Work(0, T * moe.num_experts * 4),
        "gate_up": Work(experts.flop, 2 * (active * 2 * F * H + T * H + rows * F)),
        "down": product(rows, H, F, active),
        "norm": Work(0, 2 * T * H * (8 + 2 * 2) + 2 * rows * H),
        "head": product(1, config.vocab_size, H),
    }


def measure(name: str, prompt: PromptLayers, tokens: int, ceiling: Ceiling, layers: int) -> dict[str, Any]:
    """One step, printed. layers: of the whole model."""
    rows, count = prompt.rows(tokens), prompt.config.num_layers
    prompt.step(rows)  # compiles
    device, host = prompt.seconds(rows)
    operations, launches = prompt.operations(rows)
    whole = (device - operations.get("head", 0.0)) / count * layers + operations.get("head", 0.0)
    work = work_of(prompt.config, tokens)
    floor = sum(w.floor(ceiling) * (1 if op == "head" else layers) for op, w in work.items())
    print(
        f"\n{name}, {tokens} tokens, {count} of {layers} layers: {device * 1e3:.2f} ms, host {host * 1e3:.2f} ms, "
        f"{launches / count:.1f} launches a layer; whole {whole * 1e3:.1f} ms, {100 * floor / whole:.0f}% of the floor"
    )
    print("  us a layer   floor  TFLOP/s  % of product  GB/s  % of read")
    result = {}
    for op, seconds in sorted(operations.items(), key=lambda item: -item[1]):
        each = seconds / (1 if op == "head" else count)
        result[op] = figures(each, work.get(op, Work(0, 0)), ceiling)
        print("  {us:10.1f} {floor_us:7.1f} {tflop_s:8.1f} {product:9.1f} {gb_s:9.0f} {read:9.1f}".format(
            **result[op]), op)  # fmt: skip
    return {"device_ms": device * 1e3, "host_ms": host * 1e3, "whole_ms": whole * 1e3, "floor_ms": floor * 1e3,
            "launches": launches, "operations": result}  # fmt: skip


def figures(seconds: float, work: Work, ceiling: Ceiling) -> dict[str, float]:
    """Of one operation in one layer."""
    flop, moved = work.flop / seconds, work.bytes / seconds
    return {
        "us": round(seconds * 1e6, 2), "floor_us": round(work.floor(ceiling) * 1e6, 2),
        "tflop_s": round(flop / 1e12, 1), "product": round(100 * flop / ceiling.product, 1),
        "gb_s": round(moved / 1e9, 1), "read": round(100 * moved / ceiling.read, 1),
    }  # fmt: skip


def main() -> None:
    """All models and numbers of tokens."""
    args = _arguments()
    ceiling = Ceiling(matrix_peak(_DEVICE, _DTYPE), read_bandwidth(_DEVICE))
    print(f"{ceiling.product / 1e12:.0f} TFLOP/s a product, {ceiling.read / 1e9:.0f} GB/s a read")
    counts = [int(part) for part in args.tokens.split(",")]
    limits = {"product_tflop_s": ceiling.product / 1e12, "read_gb_s": ceiling.read / 1e9}
    shared = facts(_DEVICE) | limits
    for name in args.models.split(","):
        whole = PRESETS[name].config
        config = replace(whole, layers=whole.layers[: args.layers])
        prompt = PromptLayers(config, max(counts), _DEVICE, _DTYPE)
        for tokens in counts:
            result = measure(name, prompt, tokens, ceiling, whole.num_layers)
            if args.out:
                asked = {"tokens": tokens, "layers": config.num_layers}
                row = {"benchmark": "prefill", "engine": "flexmoe", "model": name, "params": asked, "result": result}
                append(args.out, shared | row)
        del prompt
        torch.cuda.empty_cache()
        if args.sweep:
            for row in sweep(config, counts, args.sweep):
                if args.out:
                    append(args.out, shared | {"benchmark": "prefill_sweep", "model": name} | row)
            torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", help=f"some of {', '.join(sorted(PRESETS))}")
    parser.add_argument("--tokens", default="512,2048,8192")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sweep", type=float, nargs="?", const=60.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
