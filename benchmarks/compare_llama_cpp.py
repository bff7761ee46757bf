"""FlexMoE beside llama.cpp and Hugging Face on a CPU: `python benchmarks/compare_llama_cpp.py --llama-python PYTHON`.

Two models of random weights, in bf16 and in 8 bits, one engine at a time in rounds that interleave them.

The memory of a virtual machine may be twice as fast in one minute as in the next. So what a figure could be at best
goes by the median of what was measured beside its own turns: a process of its own reads half a GiB, a plain stream,
five times before and after each turn and before each round of starts, and sleeps otherwise.

benchmarks/README.md says how to get llama.cpp, what is measured and what a row holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import IO, Any

from harness import record, startup
from harness.finals import Pace, Tally, play
from harness.floors import Floors
from harness.peers import Figure, print_figures
from harness.pool import ROOT, Worker, WorkerError, child_environment
from harness.prompts import random_prompts
from harness.setups import Load, Setup

from flexmoe.config.engine import LoadConfig
from flexmoe.models.hub import open_model

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "cpu_compare_llama_cpp.jsonl"
OURS = (Setup("flexmoe", "bfloat16"), Setup("flexmoe", "int8"))
LLAMA = (Setup("llama.cpp", "bf16"), Setup("llama.cpp", "q8_0"))
STREAM = Setup("stream", "")  # no engine: how fast memory is read
EXACT = (Setup("flexmoe", "float32"), Setup("llama.cpp", "f32", cache="exact"))  # must give the same tokens
FILES = {"bfloat16": "{}", "float32": "{}", "int8": "{}-int8", "f32": "{}.f32.gguf", "bf16": "{}.bf16.gguf",
         "q8_0": "{}.q8_0.gguf"}  # fmt: skip
QUANTIZED = {"int8": "int8", "q8_0": "int8"}  # both: a byte for a weight, two for the scale of 32
LOADS = (
    Load("decode_bs1", 1, 64, 24, "tpot"),
    Load("decode_bs4", 4, 64, 24, "tpot"),
    Load("decode_bs16", 16, 64, 24, "tpot"),
    Load("prefill_512", 1, 512, 1, "ttft"),
    Load("throughput_32", 32, 64, 64, "rate"),
)
# The likeliest best of all configurations, as compare_hf.py's screening finds them; the best here goes on.
_GROUPED = Setup("transformers", "bfloat16", "grouped_mm", "dynamic")
_EAGER = Setup("transformers", "bfloat16", "eager", "static")
THEIRS = {
    "decode_bs1": (Setup("transformers", "bfloat16", "batched_mm", "static", "default"), _GROUPED),
    "decode_bs4": (Setup("transformers", "bfloat16", "batched_mm", "static"), _GROUPED),
    "decode_bs16": (_GROUPED, _EAGER),
    "prefill_512": (_GROUPED, _EAGER),
    "throughput_32": (_GROUPED,),
}
PROMPT = 64


class Bench:
    """One run over one shape, whose files lie in `folder`."""

    def __init__(self, args: argparse.Namespace, shape: str, folder: Path, stream: Worker, log: IO[str]) -> None:
        self.args, self.shape, self.folder, self.log = args, shape, folder, log
        model = folder / shape
        self.config = open_model(LoadConfig(model=str(model))).config
        self.facts = record.facts(model, args.threads) | {"benchmark": "cpu_compare_llama_cpp", "quick": args.quick}
        self.vocab = self.config.vocab_size
        self.stream = stream
        self.workers: dict[tuple[str, str, str], Worker] = {STREAM.worker_key: stream}

    def run(self) -> list[Figure]:
        """Start-up, then every load."""
        figures = self.starts()
        with ExitStack() as stack:
            for setup in [*OURS, *LLAMA, EXACT[0]]:
                stack.callback(self.worker(setup).stop)
            for load in LOADS:
                theirs = self.best_of_theirs(load, stack)
                figures += self.finals(load, [*OURS, *LLAMA, *theirs])
        return figures

    def check_conversion(self) -> None:
        """llama.cpp in fp32 gives our tokens in fp32, or the file holds another model."""
        prompts = random_prompts(self.vocab, 8, PROMPT, seed=0)
        answers = []
        for setup in EXACT:
            worker = self.worker(setup)
            answers.append(worker.run(prompts, 24, {"exact": True}, warmup=0, repeats=1)["calls"][0]["tokens"])
            self.workers.pop(setup.worker_key).stop()
        equal = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
        say(f"{self.shape}: {equal} of 8 answers of llama.cpp in fp32 are ours token for token")
        self.save({"metric": "conversion", "phase": "check", "answers_equal_to_reference": f"{equal} of 8"})
        if equal < 6:  # a near tie may fall to either side
            raise SystemExit("the converted file is not the same model; see convert_gguf.py.")

    def save(self, row: dict[str, Any]) -> None:
        record.append(self.args.out, self.facts | row)

    def file(self, setup: Setup) -> Path:
        return self.folder / FILES[setup.dtype].format(self.shape)

    def python(self, setup: Setup) -> str:
        return str(self.args.llama_python) if setup.kind == "llama.cpp" else sys.executable

    def worker(self, setup: Setup) -> Worker:
        """The process of this engine, started if it is not there. Raises WorkerError if that fails."""
        if setup.worker_key not in self.workers:
            options: dict[str, Any] = {"model": str(self.file(setup)), "threads": self.args.threads}
            if setup.kind == "flexmoe":
                options |= {"dtype": "bfloat16" if setup.dtype == "int8" else setup.dtype, "max_num_seqs": 32}
            if setup.kind == "transformers":
                options |= {"dtype": setup.dtype, "experts": setup.experts}
            self.workers[setup.worker_key] = Worker(setup.kind, options, self.log, self.python(setup))
        return self.workers[setup.worker_key]

    # ------------------------------------------------------------------ start-up

    def starts(self) -> list[Figure]:
        """Fresh processes in turn; a first round that does not count brings all files into memory."""
        scripts = dict.fromkeys(OURS, startup.FLEXMOE_IDS) | dict.fromkeys(LLAMA, startup.LLAMA_CPP_IDS)
        scripts[Setup("transformers", "bfloat16")] = startup.TRANSFORMERS_IDS
        prompt = json.dumps(random_prompts(self.vocab, 1, 16, seed=0)[0])
        seconds: dict[Setup, list[float]] = {setup: [] for setup in scripts}
        memory: dict[Setup, list[float]] = {setup: [] for setup in scripts}
        reads: list[float] = []
        for number in range(self.args.starts + 1):
            say(f"{self.shape}: start-up, round {number} of {self.args.starts}")
            reads.append(self.stream.read_rate())
            for setup, script in scripts.items():
                found = startup.measure(script, self.file(setup), prompt, self.args.threads, self.python(setup))
                if number:
                    seconds[setup].append(float(found["seconds"]))
                    memory[setup].append(float(found["peak_rss_mb"]))
        figures = []
        for setup in scripts:
            self._save_figure("peak_rss", setup, "MB", memory[setup], {})
            floor = self.floors(reads).of_start(min(seconds[setup]), "bfloat16", QUANTIZED.get(setup.dtype))
            figures.append(self._save_figure("start_to_first_token", setup, "s", seconds[setup], floor))
        return figures

    # ------------------------------------------------------------------ loads

    def best_of_theirs(self, load: Load, stack: ExitStack) -> list[Setup]:
        """The configuration of transformers that is the fastest in a call or two; none without transformers."""
        found: list[tuple[float, Setup]] = []
        for setup in [] if self.args.no_hf else THEIRS[load.metric]:
            try:
                if setup.worker_key not in self.workers:
                    stack.callback(self.worker(setup).stop)
                if len(THEIRS[load.metric]) == 1:
                    return [setup]
                prompts, warmup = self.prompts(load, 0), 2 if setup.compile else 0
                call = self.worker(setup).run(prompts, load.new, setup.variant, warmup=warmup, repeats=1)["calls"][0]
            except WorkerError as error:
                say(f"{self.shape}: {load.metric}: {setup} is not available: {error}")
                self.save({"metric": load.metric, "phase": "screening", "config": asdict(setup), "error": str(error)})
                continue
            found.append((load.value(call), setup))
            say(f"{self.shape}: {load.metric}: {setup}: {found[-1][0]:.3g} {load.unit}")
        return [min(found, key=lambda pair: pair[0])[1]] if found else []

    def finals(self, load: Load, setups: list[Setup]) -> list[Figure]:
        say(f"{self.shape}: {load.metric}")
        reference = EXACT[0] if load.figure == "tpot" and load.batch < 16 else None
        pace = Pace(1, 1, 3) if load.batch == 1 and load.new > 1 else Pace(1, 0, 1)
        distinct = self.worker(OURS[0]).distinct_experts(self.prompts(load, 1), min(load.new, 8))
        tallies = play(load, setups, self.workers, self.rounds(load), reference, pace, self.stream.read_rate)
        rates = sorted(rate for tally in tallies.values() for rate in tally.reads)
        say(f"{self.shape}: {load.metric}: memory was read at {rates[0] / 1e9:.1f} to {rates[-1] / 1e9:.1f} GB/s")
        return [self._figure(load, setup, tallies[setup], distinct, reference) for setup in setups]

    def floors(self, reads: list[float]) -> Floors:
        """By the memory's speed beside the turns of a figure."""
        return Floors(self.config, median(reads))

    def rounds(self, load: Load) -> Iterator[list[list[int]]]:
        """A short one to warm up, then new prompts until rounds or time are used up, but at least one or two rounds."""
        yield self.prompts(load, 0)[:2]
        least, start = 1 if load.figure == "rate" else 2, time.monotonic()
        for number in range(1, self.args.rounds + 1):
            if number > least and time.monotonic() - start > self.args.seconds:
                return
            yield self.prompts(load, number)

    def prompts(self, load: Load, number: int) -> list[list[int]]:
        return random_prompts(self.vocab, load.batch, load.prompt, seed=number)

    def _figure(self, load: Load, setup: Setup, tally: Tally, distinct: list[float], reference: Setup | None) -> Figure:
        middle = record.summary(tally.samples)["median"]
        facts = {"load": asdict(load), "about": self.worker(setup).about}
        floors = self.floors(tally.reads)
        facts |= floors.of_load(load, distinct, middle, "bfloat16", QUANTIZED.get(setup.dtype))
        facts["reads_gb_s"] = [round(rate / 1e9, 1) for rate in tally.reads]
        facts["cpu_seconds_of_idle_workers"] = round(tally.idle, 3)
        if reference is not None:
            facts["answers_equal_to_reference"] = f"{tally.equal} of {len(tally.samples) * load.batch}"
            facts["reference"] = str(reference)
        return self._save_figure(load.metric, setup, load.unit, tally.samples, facts)

    def _save_figure(self, metric: str, setup: Setup, unit: str, samples: list[float], facts: dict[str, Any]) -> Figure:
        figures = record.summary(samples)
        row = {"metric": metric, "phase": "final", "engine": setup.kind, "config": asdict(setup), "unit": unit}
        self.save(row | facts | figures)
        return Figure(self.shape, metric, setup, unit, figures, facts.get("percent_of_floor"))


def prepare(shape: str, folder: Path, *, exact: bool) -> None:
    """Write all files of a shape that are not there yet, in processes whose memory is gone afterwards."""
    model = folder / shape
    files = [folder / FILES[dtype].format(shape) for dtype in ("bf16", "q8_0", *(["f32"] if exact else []))]
    commands = [
        (model, [BENCHMARKS / "harness" / "random_model.py", shape, model]),
        (folder / f"{shape}-int8", ["-m", "flexmoe", "quantize", model, folder / f"{shape}-int8"]),
        (files[-1], [BENCHMARKS / "convert_gguf.py", model, *files]),
    ]
    for made, command in commands:
        if not made.exists():
            say(f"{shape}: making {made.name}")
            words = [sys.executable, *map(str, command)]
            subprocess.run(words, env=child_environment(), check=True, stdout=subprocess.DEVNULL)


def say(text: str) -> None:
    """Progress, for the reader who waits."""
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, default=sys.executable, help="Python that has llama-cpp-python")
    parser.add_argument("--shapes", default="60M,400M", help="which models (default: 60M,400M)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of a load at most (default: 7)")
    parser.add_argument("--seconds", type=float, default=6, help="no new round after so long in a load (default: 6)")
    parser.add_argument("--starts", type=int, default=3, help="processes started of each engine (default: 3)")
    parser.add_argument("--no-hf", action="store_true", help="leave out transformers")
    parser.add_argument("--quick", action="store_true", help="mark rows as no measurement: does it run at all?")
    parser.add_argument("--folder", type=Path, help="where models are made and kept (default: temporary)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append rows to")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="file for what the workers print")
    return parser.parse_args()


def main() -> None:
    """Parse the command line and run."""
    args = arguments()
    shapes = args.shapes.split(",")
    figures: list[Figure] = []
    with ExitStack() as stack:
        log = stack.enter_context(args.log.open("w"))
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flexmoe-llama-")))
        for shape in shapes:  # one conversion is checked: the same code makes the others
            prepare(shape, folder, exact=shape == shapes[0])
        stream = Worker(STREAM.kind, {"threads": args.threads}, log)
        stack.callback(stream.stop)
        for shape in shapes:
            bench = Bench(args, shape, folder, stream, log)
            if shape == shapes[0]:
                bench.check_conversion()
            figures += bench.run()
    print_figures(figures)


if __name__ == "__main__":
    main()
