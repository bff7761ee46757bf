"""What a step costs the host: everything of an engine's step but the model. Leaves: a table, and rows with --out.

The model is left out: a runner in its place lays out each step as the one for GPUs does, into the buffers that would be
sent, and samples a token that it knows beforehand. What is left is scheduling, laying out, tokens, text and outputs.
Processor time of the thread, not time of the clock, so that other jobs on the machine disturb little; the median of the
steps counts.

    python benchmarks/host_step.py --rows 64,256 --out benchmarks/results/cpu_host_step.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexmoe.bench.record import append, facts, summary
from flexmoe.config.engine import EngineConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.batch import build_batch
from flexmoe.engine.cuda_graph import bucket_of
from flexmoe.engine.engine import Engine
from flexmoe.engine.model_runner import rows_before
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.scheduling.step import Step

_CPU = torch.device("cpu")
_BLOCK = 16
_TOKEN = 300  # of the built-in vocabulary: a word


@dataclass(frozen=True, slots=True)
class KnownFlight:
    """A step whose tokens were known before."""

    step: Step

    def wait(self) -> SampleOutput:
        count = self.step.num_samples
        return SampleOutput([_TOKEN] * count, [None] * count)


class HostRunner:
    """Lays steps out and computes nothing."""

    mixes_ahead = True

    def __init__(self, most_blocks: int) -> None:
        self._most_blocks = most_blocks
        self._packed: dict[int, PackedRows] = {}
        self.device = _CPU

    def can_run_ahead(self, step: Step, states: Sequence[SamplingState]) -> bool:
        return all(state.device_ready and not state.wants_routing for state in states)

    def launch(self, step: Step, states: Sequence[SamplingState], *, after: KnownFlight | None = None) -> KnownFlight:
        decodes = step.num_decodes
        if decodes:
            sources = [-1] * decodes if after is None else rows_before(step, after.step)
            bucket = bucket_of(decodes)
            if bucket not in self._packed:
                self._packed[bucket] = PackedRows(bucket, self._most_blocks, _CPU)
            self._packed[bucket].load(step.chunks[:decodes], sources, states[:decodes])
        if decodes < len(step.chunks):
            build_batch(Step(step.chunks[decodes:], 0, []), _BLOCK, [None], _CPU)
        return KnownFlight(step)


@dataclass(frozen=True, slots=True)
class Case:
    """rows: decodes of a step. stream: each is reported after every step. drawn: their tokens are not the likeliest.

    prompt: tokens of a prompt beside them in every step.
    """

    rows: int
    stream: bool = False
    drawn: bool = False
    prompt: int = 0

    @property
    def name(self) -> str:
        words = ["drawn"] * self.drawn + ["streamed"] * self.stream
        words += [f"a prompt of {self.prompt} beside them"] * bool(self.prompt)
        return ", ".join(words) or "greedy"


def measure(case: Case, steps: int, context: int) -> list[float]:
    """Seconds of the host for each step."""
    longest = context + 2 * steps + 40
    blocks = (case.rows + 4) * (-(-longest // _BLOCK) + 1) + 4 * -(-(case.prompt + 40) // _BLOCK)
    options = {"device": "cpu", "num_blocks": blocks, "max_num_seqs": case.rows + 1, "enable_prefix_caching": False}
    options |= {"max_num_batched_tokens": 10**6, "threads": 1, "block_size": _BLOCK}
    engine = Engine(EngineConfig.from_options(options))
    try:
        engine.runner = HostRunner(-(-longest // _BLOCK) + 1)  # type: ignore[assignment]
        return list(_steps(engine, case, steps, context))
    finally:
        engine.discard([f"r{row}" for row in range(case.rows)])


def _steps(engine: Engine, case: Case, steps: int, context: int) -> Iterator[float]:
    params = SamplingParams(temperature=0.8 if case.drawn else 0.0, max_tokens=2 * steps, ignore_eos=True)
    for row in range(case.rows):
        engine.add_request([_TOKEN] * context, params, request_id=f"r{row}", stream=case.stream)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    for number in range(-5, steps):
        if case.prompt:
            engine.add_request([_TOKEN] * case.prompt, one)
        start = time.thread_time()
        engine.step()
        if number >= 0:
            yield time.thread_time() - start


def _row(case: Case, seconds: Sequence[float], args: argparse.Namespace) -> dict[str, Any]:
    params = {"rows": case.rows, "stream": case.stream, "drawn": case.drawn, "prompt": case.prompt}
    result = {"us_per_step": summary([1e6 * s for s in seconds])}
    result["us_per_row"] = round(result["us_per_step"]["median"] / case.rows, 3)  # type: ignore[assignment]
    params |= {"steps": args.steps, "context": args.context}
    return {"benchmark": "host_step", "engine": "flexmoe", "params": params, "result": result} | facts(_CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="64,256", help="decodes of a step, several with commas between")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--context", type=int, default=512, help="tokens before each decode")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens of the prompt in mixed steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for rows in map(int, args.rows.split(",")):
        for case in (Case(rows), Case(rows, drawn=True), Case(rows, stream=True), Case(rows, prompt=args.prompt)):
            seconds = measure(case, args.steps, args.context)
            print(f"{rows:4} rows, {case.name}: {1e6 * statistics.median(seconds):8.0f} us a step")
            if args.out:
                append(args.out, _row(case, seconds, args))


if __name__ == "__main__":
    main()
