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
from dataclasses import replace
from pathlib import Path

import torch

from flexmoe.bench.record import append, facts
from flexmoe.bench.step_operations import OPERATIONS, Steps
from flexmoe.models.presets import PRESETS

_DEVICE = torch.device("cuda")
_CONTEXT = 192


def main() -> None:
    """Time the step of each batch, whole and without each operation that it has."""
    args = _arguments()
    preset = PRESETS[args.model].config
    steps = Steps(replace(preset, layers=preset.layers[: args.layers]), _DEVICE)
    for batch in (int(part) for part in args.batch.split(",")):
        steps.prepare(batch, _CONTEXT)
        whole = min(steps.seconds() for _ in range(3))
        print(
            f"\n{args.model}, batch {batch}: {whole * 1e6:.1f} us a step of {args.layers} layers; us a layer (or head)"
        )
        with steps.without(*OPERATIONS) as met:
            before = steps.seconds()
        operations = [op for op in OPERATIONS if op in met]
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
