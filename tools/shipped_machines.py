"""Write the machine files that come with the package, from rows in benchmarks/results and from data sheets.

    python tools/shipped_machines.py [--measured machine.json] [--prompts machine.json] [--serving machine.json]

Enters: what each operation adds to a decode step of an H200, what a prompt's kernels took, and exchanges on two; or a
file that `flexmoe bench machine` wrote on an H200, whose device and operations then go first; those of prompts may come
from a newer one (--prompts). What a server adds is read from such a file alone, that of --measured or, without its
operations, of --serving. The files that come along are those of

    m=benchmarks/results/h200_machine.json
    python tools/shipped_machines.py --measured src/flexmoe/assets/machines/h200x1.json --prompts $m --serving $m

Leaves: src/flexmoe/assets/machines/*.json. What nobody measured is named there under "extrapolated".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexmoe.bench.collectives import link_of
from flexmoe.bench.machine_samples import gpu_prompt_samples, step_samples
from flexmoe.bench.prompt_operations import split
from flexmoe.config.machine import DeviceSpec, Link, Machine, Sample
from flexmoe.config.serving import Serving
from flexmoe.models.presets import PRESETS
from flexmoe.planner.operations import Operation, roofline

ROOT = Path(__file__).parents[1]
RESULTS, MACHINES = ROOT / "benchmarks" / "results", ROOT / "src" / "flexmoe" / "assets" / "machines"
CONTEXT = 192  # keys of each row in step_costs rows
GIB = 2**30

# Bandwidths and peaks are what streams and products reach, not data sheets', which promise a tenth more.
H200 = DeviceSpec(
    "cuda", "NVIDIA H200", round(139.8 * GIB), 4.53e12, {"bfloat16": 7.8e14, "float16": 7.8e14, "float32": 5e13},
    launch_s=2.2e-6, host_s=2.5e-5, prompt_layer_s=7e-4, torch_layer_s=1e-3, torch_chunk_s=6.5e-5,
)  # fmt: skip
H100 = replace(H200, name="NVIDIA H100 80GB HBM3", memory_bytes=round(79.1 * GIB), read_bandwidth=3.05e12)
L4 = DeviceSpec(
    "cuda", "NVIDIA L4", 22 * GIB, 2.6e11, {"bfloat16": 9e13, "float16": 9e13, "float32": 2.5e13},
    launch_s=2.5e-6, host_s=4e-5, prompt_layer_s=7e-4, torch_layer_s=1e-3, torch_chunk_s=6.5e-5,
)  # fmt: skip
CPU = DeviceSpec(
    "cpu", "two cores of a server", 23 * GIB, 3e10, {"float32": 1.2e11, "bfloat16": 2.4e11},
    launch_s=3e-6, host_s=1.5e-4, cores=2,
)  # fmt: skip
INFINIBAND = Link("infiniband", 0, 2.5e-5, 4.5e10)
SHEETS = "from data sheets and published measurements"
MORE_RANKS = "exchanges among more than 2 ranks"
GPU_RESERVE = 7 * GIB // 2


def rows(name: str) -> Iterator[dict[str, Any]]:
    """Of one file of benchmarks/results."""
    for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def step_tables() -> Iterator[Sample]:
    """What operations add to a step; where only that was measured, what the step lacks without them."""
    added: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows("h200_step_variants.jsonl"):
        if row.get("tile") is None and "change_us" in row:
            added.setdefault((row["model"], row["batch"]), {})[row["op"]] = -row["change_us"] * 1e-6
    newer: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows("h200_step_costs.jsonl"):
        newer.setdefault((row["model"], row["batch"]), {})[row["op"]] = row["added_us"] * 1e-6
    for (model, batch), found in sorted((added | newer).items()):
        yield from step_samples(PRESETS[model].config, found, batch, CONTEXT)


def prompt_tables() -> Iterator[Sample]:
    """What kernels of prompts took, the newest row of each model and length: rows of benchmarks/prefill.py."""
    newest = {
        (row["model"], row["params"]["tokens"]): row
        for row in rows("h200_prompts.jsonl") if row["benchmark"] == "prefill"
    }  # fmt: skip
    for (model, tokens), row in newest.items():
        took = {op: figures["us"] * 1e-6 for op, figures in row["result"]["operations"].items()}
        head = took.pop("head")
        parts = split(sum(took.values()) + head, 0.0, took | {"head": head}, 1)
        yield from gpu_prompt_samples(PRESETS[model].config, parts, tokens)


def nvlink(size: int) -> Link:
    """The median of each exchange."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows("h200_collectives.jsonl"):
        alike.setdefault((row["op"], row["ranks"], row["bytes"], row["mode"]), []).append(row)
    medians = [
        group[-1] | {"us": {"median": statistics.median(row["us"]["median"] for row in group)}}
        for group in alike.values()
    ]
    return link_of("nvlink", size, medians)


def with_prompts(measured: Machine, prompts: Machine) -> Machine:
    """A machine with the operations of prompts that another file has of it."""
    others = tuple(sample for sample in measured.samples if not sample.op.startswith("prompts."))
    newer = tuple(sample for sample in prompts.samples if sample.op.startswith("prompts."))
    notes = {**measured.notes, "prompts": {key: prompts.notes[key] for key in ("time", "commit")}}
    return replace(measured, samples=others + newer, notes=notes)


def on_other(samples: tuple[Sample, ...], before: DeviceSpec, after: DeviceSpec) -> tuple[Sample, ...]:
    """Samples of one device in proportion to another one's roofline."""
    found = []
    for sample in samples:
        operation = Operation(sample.op.partition(".")[2], sample.rows, sample.shape)
        ratio = roofline(operation, after, sample.dtype) / roofline(operation, before, sample.dtype)
        found.append(replace(sample, seconds=sample.seconds * ratio))
    return tuple(found)


def machines(measured: Machine | None, serving: Serving | None) -> Iterator[Machine]:
    """All of them. serving: of an H200."""
    device = H200 if measured is None else measured.device
    samples = tuple(step_tables()) if measured is None else measured.samples
    notes = {"rows": "benchmarks/results/h200_*.jsonl"} if measured is None else measured.notes
    if not any(sample.op.startswith("prompts.") for sample in samples):
        samples, notes = samples + tuple(prompt_tables()), {**notes, "prompts": "benchmarks/results/h200_prompts.jsonl"}
    one = Machine("h200x1", 1, 1, device, (), samples, GPU_RESERVE, (), notes, serving)
    yield one
    yield replace(one, name="h200x2", devices_per_node=2, links=(nvlink(2),))
    eight = replace(one, name="h200x8", devices_per_node=8, links=(nvlink(8),), extrapolated=(MORE_RANKS,))
    yield eight
    slow = f"infiniband: {SHEETS}"
    yield replace(
        eight, name="h200x64", nodes=8, links=(*eight.links, INFINIBAND), extrapolated=(MORE_RANKS, slow)
    )  # fmt: skip
    pcie = Link("pcie", 8, 2.5e-5, 2e10)
    words = ("operations: of an H200 with NVLink", f"links: {SHEETS}")
    yield replace(eight, name="h200x8-pcie", links=(pcie,), extrapolated=words)
    yield replace(
        eight, name="h100x8", device=H100, samples=on_other(samples, device, H100), serving=None,
        extrapolated=("operations: of an H200, in proportion to the roofline", "exchanges: of H200"),
    )  # fmt: skip
    rough = ("operations: roofline", f"links: {SHEETS}")
    yield Machine("l4x4-pcie", 4, 1, L4, (replace(pcie, size=4),), (), 3 * GIB // 2, rough)
    yield Machine("cpu2", 2, 1, CPU, (Link("memory", 0, 1e-3, 2e9),), (), GIB, rough)


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--measured", type=Path, help="a machine file of an H200")
    parser.add_argument("--prompts", type=Path, help="one of which only operations of prompts count")
    parser.add_argument("--serving", type=Path, help="one of which only what a server adds counts")
    args = parser.parse_args()
    paths = args.measured, args.prompts, args.serving
    measured, prompts, asked = (None if path is None else Machine.load(path) for path in paths)
    if measured is not None and prompts is not None:
        measured = with_prompts(measured, prompts)
    server = asked or measured
    for machine in machines(measured, None if server is None else server.serving):
        machine.save(MACHINES / f"{machine.name}.json")


if __name__ == "__main__":
    main()
