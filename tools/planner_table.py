"""Write the plans of known models into docs/planner.md, so that they cannot lag behind the planner and its machines.

Enters: presets, machines that come with the package. Leaves: the tables between the page's two marks; or, with --check,
exit status 1 where they are stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.machine import Machine
from flexmoe.models.presets import PRESETS
from flexmoe.planner.estimate import Promise
from flexmoe.planner.planning import Setting
from flexmoe.planner.search import Found, Objective, Question
from flexmoe.planner.workload import Workload

PAGE = Path(__file__).parents[1] / "docs" / "planner.md"
BEGIN, END = "<!-- plans: begin; written by tools/planner_table.py -->", "<!-- plans: end -->"
MODELS = {"mixtral-8x7b": "Mixtral-8x7B", "qwen3-30b-a3b": "Qwen3-30B-A3B", "olmoe-1b-7b": "OLMoE-1B-7B"}
MACHINES = {"NVLink": "h200x64", "PCIe": "h200x8-pcie"}
GPUS = (1, 2, 4, 8, 64)
LIMITS = SchedulerConfig(max_num_seqs=256)
TPOT_MS = 100.0
COLUMNS = (
    "model", "GPUs", "most tokens a second", "tok/s", "the next, and why it lost", "shortest TPOT", "ms",
    "the next, and why it lost",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n"


def machine(link: str) -> Machine:
    """H200s whose nodes are connected by InfiniBand, and inside by this link."""
    outer = Machine.load("h200x64").links[-1]
    found = Machine.load(MACHINES[link])
    return found if outer in found.links else replace(found, links=(*found.links, outer))


def rows(link: str, sizes: Sequence[int] = GPUS) -> Iterator[str]:
    """The table's lines for one kind of machine."""
    for preset, name in MODELS.items():
        for gpus in sizes:
            setting = Setting.of(preset, PRESETS[preset].config, machine(link)).resized(gpus)
            throughput, tpot = (_search(setting, objective) for objective in ("throughput", "tpot"))
            fast, soon = throughput.best, tpot.best
            cells = (
                name, gpus, fast.candidate.name, f"{fast.throughput:,.0f}", _next(throughput),
                soon.candidate.name, f"{1e3 * soon.tpot:.2f}", _next(tpot),
            )  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |"


def render() -> str:
    """Everything between the marks."""
    parts = [f"\n**{link}**\n\n{HEAD}" + "\n".join(rows(link)) + "\n" for link in MACHINES]
    return BEGIN + "\n" + "".join(parts) + "\n" + END


def stale(page: str, fresh: str) -> bool:
    """Whether the page's tables are others than these."""
    return fresh not in page


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/planner.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the tables are stale")
    checks = parser.parse_args(arguments).check
    page, fresh = PAGE.read_text(encoding="utf-8"), render()
    if not stale(page, fresh):
        return 0
    if checks:
        print("docs/planner.md has other plans than the planner finds; run `make planner-docs`.")
        return 1
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + fresh + rest.partition(END)[2], encoding="utf-8")
    return 0


def _search(setting: Setting, objective: Objective) -> Found:
    workload = Workload(rate=1.0, slo_tpot_ms=TPOT_MS)
    return setting.search(
        Question(
            space=setting.space(), demand=workload.demand(), promise=Promise.from_ms(None, TPOT_MS),
            objective=objective, limits=LIMITS,
        )
    )  # fmt: skip


def _next(found: Found) -> str:
    """The second, and why it is not the first."""
    if len(found.ranking) < 2:
        return "-"
    second = found.ranking[1]
    return f"{second.estimate.candidate.name}: {second.reason}"


if __name__ == "__main__":
    sys.exit(main())
