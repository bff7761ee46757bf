"""Holds the planner's predictions against measurements that they were not fitted to.

    python benchmarks/validate_planner.py --machine h200x1 --rows benchmarks/results/h200_latency.jsonl
    python benchmarks/validate_planner.py --machine h200x2 --rows benchmarks/results/h200_strategies.jsonl
    python benchmarks/validate_planner.py --machine machine.json --measure [--anew] [--rounds 3] [--steps steps.jsonl]
    python benchmarks/validate_planner.py --machine h200x1 --served rows.jsonl [--trace trace.csv]
    python benchmarks/validate_planner.py --machine machine.json --serve rows.jsonl [--trace trace.csv]
    python benchmarks/validate_planner.py --machine h200x8 --foretold predicted.jsonl --rows measured.jsonl

Operations of the machine's table are each predicted without their own sample. Steps are those of rows of `flexmoe bench
latency` and benchmarks/strategies.py, or with --measure of models that are measured now, which the table has no shapes
of; with --anew the machine file is measured halfway through these rounds, so that memory is as fast for both as it is
in that hour. A model whose shapes it has is predicted twice: as it is, and as if it had never been measured. On GPUs
ranks count whose sums are one launch, as today's are. Served are rows of `flexmoe bench serve` against FlexMoE's
server: their requests are simulated on the engine that each tells of; with --serve the built-in model is served on this
CPU now, and the rows are kept in that file. Foretold is what `benchmarks/strategies.py --predict` wrote down before a
run, and by how much the strategy that it would have chosen was slower than the best. A row for each group of
predictions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from harness.predicted import foretold
from harness.served import served_now

from flexmoe.bench.load import LoadOptions, lengths
from flexmoe.bench.machine_shapes import builtin_shape
from flexmoe.bench.record import append, facts
from flexmoe.config.machine import Machine, shipped_machines
from flexmoe.config.model import ModelConfig
from flexmoe.models.presets import PRESETS
from flexmoe.planner.validation import (
    Check,
    Errors,
    leave_one_out,
    measured_ms,
    prompt_checks,
    served_checks,
    step_checks,
    without_model,
)

# Measured with --measure on a CPU: model, changes, batches, prompt lengths. None of these shapes is in a table.
_UNSEEN = (
    ("tinymistral-6x248m", {"layers": 4}, (1, 4), (32, 256)),
    ("olmoe-1b-7b", {"layers": 2, "experts": 16, "top_k": 4, "expert_width": 512}, (1, 4), (64,)),
    ("qwen3-30b-a3b", {"layers": 2, "experts": 12, "top_k": 3, "expert_width": 384}, (1, 4), (64,)),
)
_NOISE = 3e-6  # seconds; operations of a GPU that take less are lost in the noise of a step


def model_of(row: dict[str, Any]) -> ModelConfig | None:
    """The model of a row, if it is the built-in one or a preset, changed or not."""
    about = row["model"]
    if about["name"] == "builtin":
        return builtin_shape().config
    preset = PRESETS.get(about["name"])
    if preset is None or preset.config.moe is None:
        return None
    config, moe = preset.config, preset.config.moe
    fewer = replace(
        moe, num_experts=about["experts"], top_k=about["top_k"], expert_width=about["expert_width"]
    )  # fmt: skip
    return replace(config, layers=config.layers[: about["layers"]], moe=fewer)


def served_model(row: dict[str, Any]) -> ModelConfig | None:
    """The model that a row's server had, if it is the built-in one or a preset as it is."""
    name = row["model"]["name"]
    if name == "builtin":
        return builtin_shape().config
    return PRESETS[name].config if name in PRESETS else None


def _read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def read_rows(paths: Sequence[Path], since: str) -> list[dict[str, Any]]:
    """Rows of our engine's steps, not older than a date."""
    rows = _read(paths)
    steps = (row for row in rows if row.get("engine") == "flexmoe" and row["benchmark"] in ("latency", "strategies"))
    return [row for row in steps if row["time"] >= since and _is_current(row)]


def _is_current(row: dict[str, Any]) -> bool:
    """Whether it was measured as decodes are computed today."""
    config, by_launch = row["config"], row["device"]["kind"] == "cuda" and row["config"].get("ranks", 1) > 1
    if "error" in row["result"] or config.get("strategy") == "one process, torch":
        return False
    return not by_launch or "one launch" in config["decode_kernels"]


def _is_prompt_current(row: dict[str, Any]) -> bool:
    """Whether its prompts were computed as today: on a GPU not in torch. Rows say `one_pass` since then."""
    return row["device"]["kind"] != "cuda" or "one_pass" in row["config"]


def measured_rows(rounds: int, halfway: Callable[[], None]) -> list[dict[str, Any]]:
    """Steps of models that no table has: of so many rounds the median of each, of an even number the quicker one.

    Rounds lie apart, lest a moment with other work counts. halfway: called between them, before the only one.
    """
    from flexmoe.bench.latency import LatencyOptions, measure
    from flexmoe.bench.subject import Changes

    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for number in range(rounds):
        if number == rounds // 2:
            halfway()
        for name, changes, batches, prompts in _UNSEEN:
            for length in prompts:
                options = LatencyOptions(
                    model=name, load_format="dummy", changes=Changes(**changes), batches=batches, prompt_len=length,
                    output_len=32, dtype="float32", device="cpu",
                )  # fmt: skip
                for row in measure(options, notify=print):
                    found.setdefault((name, length, row["params"]["batch"]), []).append(row)
    return [sorted(rows, key=lambda row: measured_ms(row["result"]))[(len(rows) - 1) // 2] for rows in found.values()]


def measure_machine(file: Path) -> None:
    """This CPU's table, into a machine file."""
    from flexmoe.bench.machine import measure

    measure(file.stem, "cpu", 1, None, notify=print).save(file)


def groups(machine: Machine, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[Check]]]:
    """Predictions by kind."""
    least = _NOISE if machine.device.kind == "cuda" else 0.0
    operations: dict[str, list[Check]] = {}
    for check in leave_one_out(machine, least):
        operations.setdefault(check.what.split()[0], []).append(check)
    yield from operations.items()
    if operations:
        yield "operations", [check for checks in operations.values() for check in checks]
    steps, unseen, prompts = [], [], []
    for row in rows:
        model = model_of(row)
        if model is not None:
            steps += step_checks(machine, model, [row])
            unseen += step_checks(without_model(machine, model), model, [row])
            prompts += prompt_checks(machine, model, [row]) if "ms" in row["result"] and _is_prompt_current(row) else []
    yield "steps", steps
    yield "steps of models not measured", unseen
    yield "first tokens", prompts


def load_of(row: dict[str, Any], trace: Path | None) -> LoadOptions:
    """What a served row was asked. trace: where its trace lies here; None: where it lay."""
    asked = {field.name: row["params"][field.name] for field in fields(LoadOptions)}
    asked |= {name: tuple(asked[name]) for name in ("input_len", "output_len")}
    if asked["trace"] is not None:
        asked["trace"] = trace or Path(asked["trace"])
    return LoadOptions(**asked)


def served_groups(
    machine: Machine, rows: Sequence[dict[str, Any]], trace: Path | None, *, cold: bool = False
) -> Iterator[tuple[str, list[Check]]]:
    """Predictions of rows of presets, or the built-in model, that FlexMoE served: TTFT and TPOT, means and medians."""
    found = [
        served_checks(machine, model, lengths(load_of(row, trace), row["params"].get("concurrency")), row, cold=cold)
        for row in rows
        if row["benchmark"] == "serve" and row["config"].get("engine") and (model := served_model(row)) is not None
    ]
    for group in dict.fromkeys(chain.from_iterable(found)):
        yield group, [checks[group] for checks in found if group in checks]


def _step_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """As asked for: of files, or measured now, the machine's table halfway."""
    if not args.measure:
        return _read(args.rows) if args.foretold else read_rows(args.rows, args.since)
    rows = measured_rows(args.rounds, lambda: measure_machine(Path(args.machine)) if args.anew else None)
    for row in rows if args.steps else ():
        append(args.steps, row)
    return rows


def main() -> None:
    """Print, and append rows."""
    args = _arguments()
    machine = None if args.anew else Machine.load(args.machine)  # what is wrong is said before anything is measured
    served = _read(args.served)
    rows = _step_rows(args)
    machine = machine or Machine.load(args.machine)
    for row in served_now(args.trace, args.rounds) if args.serve else ():
        append(args.serve, row)
        served.append(row)
    kinds = [served_groups(machine, served, args.trace, cold=args.cold)]
    if args.foretold:
        kinds.append(foretold(_read(args.foretold), rows))
    elif rows or not served:
        kinds.append(groups(machine, rows))
    for group, checks in chain.from_iterable(kinds):
        if not checks:
            continue
        errors = Errors.of(checks)
        print(
            f"{group:>30}: {errors.count:4} predictions, mean error {errors.mean:6.1%}, 95% below {errors.p95:6.1%}, "
            f"worst {errors.worst:6.1%}"
        )
        if args.verbose:
            for check in checks:
                print(f"{check.error:+8.1%}  {check.measured * 1e3:9.3f} ms  {check.what}")
        if args.out:
            about = {"benchmark": "validate_planner", "machine": machine.name, "group": group}
            result = asdict(errors) | {"checks": [asdict(check) for check in checks]}
            append(args.out, about | {"result": result} | facts())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--machine", required=True, help="a file, or the name of a machine that comes along")
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--foretold", type=Path, nargs="*", default=[], help="rows of `strategies.py --predict`")
    parser.add_argument("--served", type=Path, nargs="*", default=[], help="rows of `flexmoe bench serve`")
    parser.add_argument("--serve", type=Path, help="serve on this CPU now, and append rows to this file")
    parser.add_argument("--rounds", type=int, default=2, help="how often a load is served, or a step measured")
    parser.add_argument("--trace", type=Path, help="the trace of the served rows, if it is not where they say")
    parser.add_argument("--cold", action="store_true", help="each served row was its server's first load")
    parser.add_argument("--since", default="", help="leave out rows that are older than this date")
    parser.add_argument("--measure", action="store_true", help="measure steps on this CPU now")
    parser.add_argument("--steps", type=Path, help="with --measure: append the rows of these steps to this file")
    parser.add_argument("--anew", action="store_true", help="with --measure: write --machine anew, halfway")
    parser.add_argument("--verbose", action="store_true", help="each prediction")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.anew or args.steps) and not args.measure:
        parser.error("--anew and --steps belong to --measure")
    if args.anew and (args.machine in shipped_machines() or not Path(args.machine).absolute().parent.is_dir()):
        parser.error(f"--anew writes --machine, and {args.machine} is no file that it can write")
    return args


if __name__ == "__main__":
    main()
