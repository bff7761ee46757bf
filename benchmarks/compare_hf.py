"""FlexMoE beside Hugging Face transformers on a CPU: `python benchmarks/compare_hf.py [--model FOLDER] [--quick]`.

Every sensible configuration of generate() is tried in a screening; the best few of each metric then run against ours
in interleaved rounds. benchmarks/README.md says what a row holds, LOG.md why it is measured in this way.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from harness import record, startup
from harness.finals import Tally, play
from harness.floors import Floors, measure_bandwidth
from harness.pool import ROOT, Worker, WorkerError
from harness.prompts import make_prompts
from harness.setups import OURS, REFERENCE, Load, Setup, loads, transformers_setups
from harness.table import Result, print_table

from flexmoe.config.engine import LoadConfig
from flexmoe.models.hub import open_model

RESULTS = ROOT / "benchmarks" / "results" / "cpu_compare_hf.jsonl"
BUILTIN = ROOT / "src" / "flexmoe" / "assets" / "builtin"
START_PROMPT = "Once upon a time there was"


class Bench:
    """One run: its model, its options, the file of its rows."""

    def __init__(self, args: argparse.Namespace, log: IO[str]) -> None:
        self.args, self.log = args, log
        self.facts = record.facts(args.model, args.threads) | {"benchmark": "cpu_compare_hf", "quick": args.quick}
        self.floors = Floors(open_model(LoadConfig(model=str(args.model))).config, measure_bandwidth(args.threads))
        self.loads = loads(args.quick)
        self.rounds = args.rounds or (2 if args.quick else 9)

    def run(self) -> None:
        """Start-up, screening, finals, table."""
        results = self.startup()
        print_table([*results, *self.finals(self.screen())])

    def save(self, row: dict[str, Any]) -> None:
        record.append(self.args.out, self.facts | row)

    def worker(self, setup: Setup) -> Worker:
        """Load `setup` in a process of its own. Raises WorkerError if that fails."""
        options = {"model": str(self.args.model), "dtype": setup.dtype, "threads": self.args.threads}
        own: dict[str, Any] = {"max_num_seqs": 8} if setup.ours else {"experts": setup.experts}
        return Worker(setup.kind, options | own, self.log)

    def prompts(self, load: Load, number: int) -> list[list[int]]:
        """Those of one round."""
        return make_prompts(self.args.model, load.batch, load.prompt, seed=number)

    # ------------------------------------------------------------------ start-up

    def startup(self) -> list[Result]:
        """Fresh processes in turn; a first round that does not count brings all files into memory."""
        rounds = 1 if self.args.quick else 7
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in startup.scripts()}
        for number in range(rounds + 1):
            say(f"start-up: round {number} of {rounds}")
            for name, script in startup.scripts().items():
                measured = startup.measure(script, self.args.model, START_PROMPT, self.args.threads)
                if number:
                    found[name].append(measured)
        text = found["transformers fp32"][0]["text"]
        results = []
        for metric, unit, key in (("start_to_first_token", "s", "seconds"), ("peak_rss", "MB", "peak_rss_mb")):
            for name, measured_rounds in found.items():
                figures = record.summary([measured[key] for measured in measured_rounds])
                equal = sum(measured["text"] == text for measured in measured_rounds)
                results.append(Result(metric, name, name.startswith("flexmoe"), unit, figures, f"{equal} of {rounds}"))
                self._save_startup(results[-1])
        return results

    def _save_startup(self, result: Result) -> None:
        kind, _, dtype = result.name.partition(" ")
        row = {"metric": result.metric, "phase": "final", "engine": kind, "config": {"dtype": dtype}}
        if result.unit == "s":
            own = self.floors.config.checkpoint_dtype
            number = {"auto": own, "fp32": "float32", "bf16": "bfloat16"}[dtype]
            row |= self.floors.of_start(result.median, number)
        self.save(row | {"unit": result.unit, "answers_equal_to_reference": result.answers} | result.summary)

    # ------------------------------------------------------------------ screening

    def screen(self) -> dict[str, list[Setup]]:
        """Try every configuration of transformers alone; the best few of each metric, best first."""
        found: dict[str, list[tuple[float, Setup]]] = {load.metric: [] for load in self.loads}
        setups = transformers_setups(self.args.quick, self.args.max_autotune)
        for key in dict.fromkeys(setup.worker_key for setup in setups):
            same = [setup for setup in setups if setup.worker_key == key]
            try:
                worker = self.worker(same[0])
            except WorkerError as error:
                self._refused({"config": asdict(same[0])}, same[0], error)
                continue
            for setup in same:
                for load in self.loads:
                    self._try(worker, setup, load, found[load.metric])
            worker.stop()
        return {metric: _best(tried, self.args.finalists) for metric, tried in found.items()}

    def _try(self, worker: Worker, setup: Setup, load: Load, found: list[tuple[float, Setup]]) -> None:
        if setup.compile and load.figure == "ttft":
            return  # generate() compiles decode steps only
        row = {"metric": load.metric, "config": asdict(setup)}
        try:
            # Compiled code needs a few calls until every shape has been met.
            warmup = 3 if setup.compile else 1
            calls = worker.run(self.prompts(load, 0), load.new, setup.variant, warmup=warmup, repeats=3)["calls"]
        except WorkerError as error:
            self._refused(row, setup, error)
            return
        figures = record.summary([load.value(call) for call in calls])
        say(f"screening: {load.metric:12} {setup}: {figures['median']:.2f} ms")
        self.save(row | {"phase": "screening", "engine": setup.kind, "unit": "ms"} | figures)
        found.append((figures["median"], setup))

    def _refused(self, row: dict[str, Any], setup: Setup, error: WorkerError) -> None:
        """A configuration that this machine or this version does not run is a row, too."""
        say(f"screening: {row.get('metric', ''):12} {setup}: not available, {error}")
        self.save(row | {"phase": "screening", "engine": setup.kind, "error": str(error)})

    # ------------------------------------------------------------------ finals

    def finals(self, best: dict[str, list[Setup]]) -> list[Result]:
        """Ours and the best of theirs."""
        every = [*OURS, REFERENCE, *(setup for setups in best.values() for setup in setups)]
        results: list[Result] = []
        with ExitStack() as stack:
            workers: dict[tuple[str, str, str], Worker] = {}
            for setup in every:
                if setup.worker_key not in workers:
                    workers[setup.worker_key] = worker = self.worker(setup)
                    stack.callback(worker.stop)
            for load in self.loads:
                say(f"finals: {load.metric}, {self.rounds} rounds")
                setups = [*OURS, *best[load.metric]]
                prompts = [self.prompts(load, number) for number in range(self.rounds + 1)]
                # Counted once for all: the others choose the same experts, but for roundings.
                distinct = workers[OURS[0].worker_key].distinct_experts(prompts[1], load.new)
                tallies = play(load, setups, workers, prompts)
                results += [self._result(load, s, tallies[s], workers[s.worker_key].about, distinct) for s in setups]
        return results

    def _result(self, load: Load, setup: Setup, tally: Tally, about: dict[str, Any], distinct: list[float]) -> Result:
        answers = f"{tally.equal} of {self.rounds * load.batch}"
        result = Result(load.metric, str(setup), setup.ours, "ms", record.summary(tally.samples), answers)
        self.save(
            {
                "metric": load.metric,
                "phase": "final",
                "engine": setup.kind,
                "config": asdict(setup),
                "load": asdict(load),
                "about": about,
                "unit": "ms",
                "answers_equal_to_reference": answers,
                "reference": str(REFERENCE),
                "cpu_seconds_of_idle_workers": round(tally.idle, 3),
                **self.floors.of_load(load, distinct, result.median, about.get("dtype", setup.dtype)),
                **result.summary,
            }
        )
        return result


def _best(tried: list[tuple[float, Setup]], count: int) -> list[Setup]:
    return [setup for _, setup in sorted(tried, key=lambda pair: pair[0])[:count]]


def say(text: str) -> None:
    """Progress, for the reader who waits."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN, help="a model's folder (default: the built-in model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: 9; quick: 2)")
    parser.add_argument("--finalists", type=int, default=3, help="configurations of transformers in the finals")
    parser.add_argument("--max-autotune", action="store_true", help="also compile with max-autotune: many minutes")
    parser.add_argument("--quick", action="store_true", help="few configurations and rounds: does it run at all?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append rows to")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="file for what the workers print")
    args = parser.parse_args()
    args.model = args.model.resolve()
    with args.log.open("w") as log:
        Bench(args, log).run()


if __name__ == "__main__":
    main()
