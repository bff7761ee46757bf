"""Draws the loss curve from training logs.

In: train_log.jsonl of each phase, in order. Out: an SVG with training loss and held-out loss of each group.
Run: python -m training.plot --logs MAIN.jsonl FINISH.jsonl --output training/results/loss_curve.svg
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]


def read(logs: list[Path]) -> tuple[dict[str, Points], list[int]]:
    """Curves by name over the steps of all phases, and the step at which each phase ends."""
    curves: dict[str, Points] = defaultdict(list)
    ends: list[int] = []
    offset = 0
    for path in logs:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            step = offset + row["step"]
            if "loss" in row:
                curves["training"].append((step, row["loss"]))
            for group, loss in row.get("validation", {}).items():
                curves[f"{group}, held out"].append((step, loss))
        offset += rows[-1]["step"]
        ends.append(offset)
    return curves, ends


def draw(curves: dict[str, Points], ends: list[int], output: Path) -> None:
    """Writes the figure."""
    import matplotlib as mpl  # only this script needs it: pip install matplotlib

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4))
    for name, points in curves.items():
        style: dict[str, Any] = {"color": "0.75", "linewidth": 0.8} if name == "training" else {"linewidth": 1.5}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    for end in ends[:-1]:
        axes.axvline(end, color="0.4", linestyle=":", linewidth=1)
    axes.set(xlabel="step (131,072 tokens each)", ylabel="nats a token", ylim=(1, 5))
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, nargs="+", required=True, help="train_log.jsonl of each phase")
    parser.add_argument("--output", type=Path, required=True, help="SVG file")
    args = parser.parse_args()
    draw(*read(args.logs), args.output)


if __name__ == "__main__":
    main()
