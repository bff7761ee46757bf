"""`flexmoe plan`: how to spread a model over a machine. Leaves: a table of plans with reasons, the best one's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.planning import (
    limits_of,
    setting_of,
    setting_options,
    times_of,
    wide_console,
    workload_of,
    workload_options,
)  # fmt: skip
from flexmoe.cli.terminal import note, several
from flexmoe.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flexmoe.planner.estimate import Estimate
    from flexmoe.planner.planning import Setting
    from flexmoe.planner.search import Found, Question, Ranked

_OBJECTIVES = ("throughput", "tpot", "ttft")
# What a term of each objective is a time of, in the order of _OBJECTIVES.
_LOST_IN = dict(zip(_OBJECTIVES, ("a token, all GPUs together", "an output token", "the first token"), strict=True))
_positive = click.IntRange(min=1)


@click.command()
@click.argument("model", required=False)
@setting_options
@click.option("--gpus", type=_positive, help="Devices to use, all of them.  [default: the machine's]")
@workload_options
@click.option(
    "--objective",
    type=click.Choice(_OBJECTIVES),
    default="throughput",
    show_default=True,
    help="The most tokens a second within the promised times, or the shortest times at the rate.",
)
@click.option("--one-engine", is_flag=True, help="No independent engines behind a router: all GPUs in one plan.")
@click.option("--only-data-parallel", is_flag=True, help="Neither slices of layers nor stages.")
@click.option("--search-budget", type=_positive, help="Plans to cost at most.  [default: all]")
@click.option("--top", type=_positive, default=8, show_default=True, help="Rows of the table.")
@click.option("--explain", is_flag=True, help="Show what the best plan's times consist of, and what cannot run.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the best plan there, for --plan.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@debug_option
def plan(model: str | None, **options: Any) -> None:
    """Search the best way to spread MODEL over a machine.

    MODEL is a folder, a name on the Hub, a preset or nothing for the built-in model; its weights are not needed. Every
    plan that fits is costed by a table of the machine; docs/planner.md tells how.

    \b
    Examples:
      flexmoe plan mixtral-8x7b --machine h100x8 --gpus 4
      flexmoe plan qwen3-30b-a3b --machine machine.json --rate 8 --slo-tpot-ms 30 --explain
      flexmoe plan olmoe-1b-7b --machine h100x8 --trace trace.csv --out plan.json
    """
    from flexmoe.planner.estimate import Promise
    from flexmoe.planner.search import Question

    setting = setting_of(model, options).resized(options["gpus"])
    workload = workload_of(options)
    question = Question(
        space=setting.space(one_engine=options["one_engine"], only_data_parallel=options["only_data_parallel"]),
        demand=workload.demand(),
        promise=Promise.from_ms(workload.slo_ttft_ms, workload.slo_tpot_ms),
        objective=options["objective"],
        limits=limits_of(options, setting.model.max_position),
        budget=options["search_budget"],
    )
    _check_lengths(question)
    found = setting.search(question)
    if options["out"] is not None:
        found.best.candidate.plan.write(options["out"])
    if options["as_json"]:
        click.echo(json.dumps(_as_json(found, serving=setting.machine.serving is not None), indent=2))
    else:
        _print(found, question, setting, options["top"], explain=options["explain"])
        note(times_of(setting.machine))
    if options["out"] is not None:
        note(f"The plan is in {options['out']}: use it by --plan.{_engines(found.best)}")


def _check_lengths(question: Question) -> None:
    """A plan for requests that no engine would take answers nothing."""
    demand, most = question.demand, question.limits.max_model_len
    if most is not None and demand.mean_input + demand.mean_output > most:
        raise ConfigError(
            f"requests of {demand.mean_input:.0f} + {demand.mean_output:.0f} tokens do not fit a context of {most}; "
            "use shorter ones (--input-len, --output-len, --length-scale), or a longer --max-model-len if there is one."
        )


def _engines(best: Estimate) -> str:
    count, each = best.candidate.replicas, several(best.candidate.plan.num_ranks, "GPU")
    return f" Start {count} engines with it, on {each} each." if count > 1 else ""


def _as_json(found: Found, *, serving: bool) -> dict[str, Any]:
    """serving: whether TTFT and TPOT hold what an HTTP server adds."""
    return {
        "objective": found.objective,
        "serving": serving,
        "skipped": found.skipped,
        "plans": [_row_json(ranked) for ranked in found.ranking],
    }


def _legend(found: Found, able: list[Ranked], top: int) -> str:
    """What the table leaves out, and what its last column and its stars mean."""
    told = {
        "plans costed": len(able),
        "of them not shown": max(0, len(able) - top),
        "do not fit in memory": len(found.ranking) - len(able),
        "beyond the search budget": found.skipped,
    }
    words = ", ".join(f"{number} {what}" for what, number in told.items() if number)
    return f"{words}. Why it lost: what it loses most by, in time for {_LOST_IN[found.objective]}." + (
        " * past what was measured: extrapolated." if any(r.estimate.extrapolated for r in able[:top]) else ""
    )


def _row_json(ranked: Ranked) -> dict[str, Any]:
    estimate = ranked.estimate
    about = {"name": estimate.candidate.name, "engines": estimate.candidate.replicas}
    placeless = {key: v for key, v in estimate.candidate.plan.to_json().items() if key != "placements"}
    if estimate.refused:
        return {**about, "plan": placeless, "reason": ranked.reason}
    return {
        **about,
        "plan": placeless,
        "ttft_ms": 1e3 * estimate.ttft,
        "tpot_ms": 1e3 * estimate.tpot,
        "output_tokens_per_s": estimate.throughput,
        "batch": estimate.batch,
        "largest_batch": estimate.most,
        "requests_per_s": estimate.rate,
        "terms_ms": {name: 1e3 * seconds for name, seconds in estimate.token.items()},
        "extrapolated": estimate.extrapolated,
        "reason": ranked.reason,
    }


def _print(found: Found, question: Question, setting: Setting, top: int, *, explain: bool) -> None:
    console = wide_console()
    console.print(_heading(question, setting), markup=False)
    able = [ranked for ranked in found.ranking if not ranked.estimate.refused]
    console.print(_table(able[:top]))
    console.print(_legend(found, able, top), style="dim", markup=False)
    most, asked = max(ranked.estimate.rate for ranked in able), question.demand.rate
    if most < asked:
        console.print(
            f"No plan keeps up: {most:.3g} requests/s are answered at most, asked are {asked:.3g}. Times are those of "
            "as many at once as fit, and who comes later waits ever longer; ask for less by --rate.",
            style="yellow", markup=False,
        )  # fmt: skip
    if explain:
        _explain(console, found)


def _heading(question: Question, setting: Setting) -> str:
    demand, promise = question.demand, question.promise
    promised = [f"{name} {1e3 * s:g} ms" for name, s in (("TTFT", promise.ttft), ("TPOT", promise.tpot)) if s]
    wish = {"throughput": "most tokens a second", "tpot": "shortest TPOT", "ttft": "shortest TTFT"}[question.objective]
    machine = setting.machine
    numbers = f"{setting.quantization}, {setting.dtype}" if setting.quantization else setting.dtype
    return (
        f"{setting.name} on {question.space.gpus} x {machine.device.name} ({machine.name}), {numbers}\n"
        f"{demand.rate:.3g} requests/s of {demand.mean_input:.0f} + {demand.mean_output:.0f} tokens; {wish}"
        + (f" within {', '.join(promised)}" if promised else "")
    )


def _table(rows: list[Ranked]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("plan", "TTFT ms", "TPOT ms", "tok/s", "most at once", "why it lost"):
        table.add_column(name, justify="left" if name in ("plan", "why it lost") else "right")
    for ranked in rows:
        e = ranked.estimate
        mark = "*" if e.extrapolated else ""
        figures = (f"{1e3 * e.ttft:.3g}{mark}", f"{1e3 * e.tpot:.3g}{mark}", f"{e.throughput:,.0f}{mark}", str(e.most))
        table.add_row(e.candidate.name, *figures, ranked.reason or "the best", style=None if ranked.reason else "bold")
    return table


def _explain(console: Console, found: Found) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    best = found.best
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=f"The best: {best.candidate.name}", title_justify="left")
    for name in ("term", "first token, ms", "each token, ms", "us a token, of all GPUs"):
        table.add_column(name, justify="left" if name == "term" else "right")
    for name in dict.fromkeys((*best.first, *best.token, *best.work)):
        values = (1e3 * best.first.get(name, 0.0), 1e3 * best.token.get(name, 0.0), 1e6 * best.work.get(name, 0.0))
        table.add_row(name, *(f"{value:.3g}" if value else "-" for value in values))
    sums = 1e3 * sum(best.first.values()), 1e3 * sum(best.token.values()), 1e6 * sum(best.work.values())
    table.add_section()
    table.add_row("sum", *(f"{value:.3g}" for value in sums))
    console.print(table)
    console.print(
        f"Decodes {best.batch} requests together at this rate, {best.most} at most: {best.limit} sets the limit.",
        markup=False,
    )
    for ranked in found.ranking:
        if ranked.estimate.refused:
            console.print(f"{ranked.estimate.candidate.name}: {ranked.reason}", style="dim", markup=False)
