"""`flexmoe balance`: from the routing to a plan. Enters: a recording. Leaves: a table, and the plan's file.

A recording is made by `flexmoe generate --record-routing` or `LLM.record_routing`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import click

from flexmoe.cli.options import debug_option
from flexmoe.config.plan import MOE_DISPATCH, ExpertPlacement, ParallelPlan
from flexmoe.config.routing import LayerLoad, imbalance, rank_active, read_recording
from flexmoe.planner.balance import balanced_plan, rank_imbalance

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """A layer before and after. Imbalance is largest over mean: experts', then ranks'.

    active: experts that a pass read, on average; of them the busiest rank's, before and after. replicas: slots beyond
    one for each expert.
    """

    layer: int
    experts: float
    active: float
    before: float
    after: float
    rank_active_before: float
    rank_active_after: float
    replicas: int


@click.command(short_help="Place experts evenly on ranks, by a RECORDING of routing.")
@click.argument("recording", type=click.Path(exists=True, dir_okay=False))
@click.option("--ranks", type=click.IntRange(min=2), required=True, help="Processes to spread whole experts over.")
@click.option(
    "--spare-slots",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Places for replicas of hot experts on each rank, each costing the memory of an expert.",
)
@click.option(
    "--moe-dispatch",
    type=click.Choice(MOE_DISPATCH),
    default="auto",
    show_default=True,
    help="Add the ranks' results, or send tokens to their experts.",
)
@click.option("--out", type=click.Path(dir_okay=False, writable=True), help="Write the plan there, for --plan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def balance(recording: str, ranks: int, spare_slots: int, moe_dispatch: str, out: str | None, as_json: bool) -> None:
    """Place experts so that ranks have equally much to do, by a RECORDING of the routing.

    The hottest experts get replicas in the spare slots, the rest is packed by load, each layer by its own. Imbalance is
    the largest load over the mean: 1.00 is even, and a layer of prompts takes about that many times as long.

    \b
    Examples:
      flexmoe generate --file prompts.json --record-routing routing.jsonl
      flexmoe balance routing.jsonl --ranks 2 --spare-slots 1 --out plan.json
      flexmoe generate --plan plan.json "Once upon a time"
    """
    loads = read_recording(recording)
    plan = balanced_plan(loads, ranks, spare_slots, moe_dispatch)
    if out is not None:
        plan.write(out)
    rows = [_row(load, plan) for load in loads]
    if as_json:
        about = {"model": loads[0].model, "ranks": ranks, "spare_slots": spare_slots}
        click.echo(json.dumps({**about, "layers": [asdict(row) for row in rows]}, indent=2))
        return
    from rich.console import Console

    Console().print(_table(loads, rows))
    if out is not None:
        click.echo(f"The plan is in {out}: use it by --plan.", err=True)


def _row(load: LayerLoad, plan: ParallelPlan) -> Row:
    num_experts = len(load.counts)
    placement = plan.placement(num_experts, load.layer)
    plain = ExpertPlacement.contiguous(num_experts, placement.num_ranks)
    replicas = sum(map(len, placement.slots)) - num_experts
    before, after = (rank_imbalance(load, place) for place in (plain, placement))
    reads, will_read = (max(rank_active(load, place)) for place in (plain, placement))
    return Row(load.layer, imbalance(load.counts), load.mean_active, before, after, reads, will_read, replicas)


def _table(loads: Sequence[LayerLoad], rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = loads[0]
    title = f"{first.model}: {first.tokens} tokens in {first.passes} passes, {len(first.counts)} experts"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", show_footer=True)

    def mean(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.2f}"

    table.add_column("layer", "mean", justify="right")
    columns = {
        "experts' imbalance": [row.experts for row in rows],
        "active experts": [row.active for row in rows],
        "ranks before": [row.before for row in rows],
        "ranks after": [row.after for row in rows],
    }
    for name, values in columns.items():
        table.add_column(name, mean(values), justify="right")
    table.add_column("replicas", str(sum(row.replicas for row in rows)), justify="right")
    for number, row in enumerate(rows):
        cells = [f"{values[number]:.2f}" for values in columns.values()]
        table.add_row(str(row.layer), *cells, str(row.replicas))
    return table
