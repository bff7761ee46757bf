"""The strategies of spreading a model over ranks, side by side on one machine: speed, bytes sent, imbalance.

    python benchmarks/strategies.py [MODEL] [--ranks 2,4] [--batch 1,8] [--device cuda] [--hf] [--out rows.jsonl]
    python benchmarks/strategies.py MODEL --ranks 4 --prompts 2048,8192 --requests 512 [--out rows.jsonl]
    python benchmarks/strategies.py MODEL --ranks 4 --predict h200x8 [--out rows.jsonl]

On a CPU one process decodes in torch, as ranks do there, and as it comes; on GPUs as it comes, which is how ranks do
it, if one GPU holds the model. Then each strategy on each number of ranks. All get the same prompts, greedily, exactly
so many tokens; in fp32 their answers must be the same. A sample is (time for N + 1 tokens - time for 1) / N. Bytes are
those that all ranks together send for a token of a decode step, beside what the formulas of docs/parallel.md give for
the experts that one process was seen to choose. The floor is the time to read the weights, keys and values of a step at
the speed measured at the start. A row is one JSON line.

--prompts: also the time to the first token of one prompt of each such length. --requests: also so many at once, of 512
tokens and 128 more, which on one GPU is what `flexmoe bench throughput` does. --predict: nothing is measured; the
planner says what each would take on that machine, to be held against a run later.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness.predicted import Expected, middle
from harness.step_times import REPEATS, add_question, asked, numbers, step_times
from harness.traffic import Bytes, Choices, formula, imbalance

from flexmoe import LLM, SamplingParams
from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.engines import TimedEngine
from flexmoe.bench.hugging_face import HuggingFace
from flexmoe.bench.latency import first_difference
from flexmoe.bench.record import append, facts, summary
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts
from flexmoe.config.engine import MAX_ROWS, SchedulerConfig
from flexmoe.config.machine import Machine
from flexmoe.config.plan import ParallelPlan
from flexmoe.engine import startup
from flexmoe.engine.ranks import RankedRunner
from flexmoe.errors import ConfigError
from flexmoe.planner.floor import floor, mean_context

Row = dict[str, Any]

_MANY = (512, 128)  # tokens of each of many requests, and of their answers


@dataclass(frozen=True, slots=True)
class Setup:
    """One way to run the model. torch_path: one process without its kernels in C, to compare ranks with."""

    name: str
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    torch_path: bool = False


TORCH, AS_IT_COMES = Setup("one process, torch", torch_path=True), Setup("one process, as it comes")


def setups(ranks: int) -> list[Setup]:
    """The strategies on so many ranks; a hybrid needs four or more, of an even number."""
    found = [
        Setup("tensor", ParallelPlan(ranks)),
        Setup("expert, all-reduce", ParallelPlan(ranks, ranks)),
        Setup("expert, all-to-all", ParallelPlan(ranks, ranks, moe_dispatch="all_to_all")),
    ]
    found.append(Setup("data, experts spread", ParallelPlan(data_parallel_size=ranks, expert_parallel_size=ranks)))
    if ranks >= 4 and ranks % 2 == 0:
        found.append(Setup("hybrid, all-reduce", ParallelPlan(ranks, ranks // 2)))
        found.append(Setup("hybrid, all-to-all", ParallelPlan(ranks, ranks // 2, moe_dispatch="all_to_all")))
    return found


class Ours:
    """FlexMoE in one setup."""

    def __init__(self, subject: Subject, setup: Setup, options: Row) -> None:
        self._name = subject.name
        left_out = _without_c() if setup.torch_path else contextlib.nullcontext()
        with left_out:
            self.llm = LLM(
                str(subject.folder), load_format=subject.load_format, enable_prefix_caching=False,
                plan=setup.plan, **options,
            )  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether decode steps run in Triton kernels."""
        return str(self.llm.describe()["decode_kernels"]).startswith("Triton")

    @property
    def one_shot(self) -> bool:
        """Whether ranks read each other's parts of a sum."""
        return str(self.llm.describe()["decode_kernels"]).endswith("one launch")

    def about(self) -> Row:
        return self.llm.describe() | {"model": self._name}

    def generate(self, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return [list(output.token_ids) for output in self.llm.generate(list(prompts), params)]

    def choices(self, prompts: Sequence[list[int]], count: int) -> Choices:
        """Of one process."""
        seen = Choices(len(prompts))
        self.llm.engine.local_runner.probe = seen
        self.generate(prompts, count)
        self.llm.engine.local_runner.probe = None
        return seen

    def sent(self, prompts: Sequence[list[int]], count: int) -> Bytes:
        """Bytes by label that all ranks send for a token of a decode step."""
        runner = self.llm.engine.runner
        assert isinstance(runner, RankedRunner)
        found: list[Bytes] = []
        for tokens in (1, count):  # with the prompts and their first tokens, and with the decode steps as well
            runner.traffic()
            self.generate(prompts, tokens)
            ranks = runner.traffic()
            found.append({label: sum(rank.get(label, 0) for rank in ranks) for label in ranks[-1]})
        share = len(prompts) * (count - 1)
        return {label: (total - found[0].get(label, 0)) / share for label, total in found[1].items()}


def _release_memory(device: str) -> None:
    """What a model of this process held, for the ranks, which are others."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _without_c() -> Iterator[None]:
    """Models loaded inside decode in torch, with weights packed for it."""
    original = startup.why_not_native
    startup.why_not_native = lambda *_: "left out"  # type: ignore[assignment]
    try:
        yield
    finally:
        startup.why_not_native = original


class Bench:
    """One run: what all rows have in common, and what one process answered."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        device = torch.device(args.device)
        self.facts, self.bandwidth = facts(device), read_bandwidth(device)
        vocab = subject.config.vocab_size
        self.prompts = {batch: make_prompts(vocab, batch, args.prompt_len, args.seed) for batch in args.batch}
        self.answers: dict[int, list[list[int]]] = {}
        self.choices: dict[int, Choices] = {}

    def rows(self) -> Iterator[Row]:
        """Of one process first: the others are compared with it."""
        first = AS_IT_COMES if self.args.device == "cuda" else TORCH
        for setup in (first, *(setup for setup in chosen(self.args) if setup != first)):
            _release_memory(self.args.device)
            try:
                engine = Ours(self.subject, setup, self._options())
            except ConfigError as error:
                yield self._row("flexmoe", {"strategy": setup.name}, {}, {"error": str(error)})
                continue
            with engine.llm:
                yield from self._measure(engine, setup)

    def _options(self) -> Row:
        args, most = self.args, max(self.args.batch)
        longest = max(args.prompt_len + args.output_len, *args.prompts, sum(_MANY) if args.requests else 0)
        return {
            "dtype": args.dtype, "device": args.device, "max_num_seqs": max(most, min(args.requests, MAX_ROWS)),
            "max_model_len": longest + 1,
        } | ({} if args.device == "cuda" else self._on_a_cpu())  # fmt: skip

    def _on_a_cpu(self) -> Row:
        """All prompts in one step, so that all rows decode together. On a GPU steps have up to 8,192 tokens: those that
        prompts do not fill have decodes beside them.
        """
        args = self.args
        step = max(max(args.batch) * args.prompt_len, *args.prompts, 0)
        return {"max_num_batched_tokens": step, "kv_cache_memory": args.kv_cache_memory}

    def _measure(self, engine: Ours, setup: Setup) -> Iterator[Row]:
        plan = setup.plan
        config = {"strategy": setup.name, "ranks": plan.num_ranks, "plan": plan.to_json()} | engine.about()
        count = self.args.output_len + 1
        for batch, prompts in self.prompts.items():
            result = self._timed(engine, batch)
            if plan.num_ranks > 1:
                result |= self._spread(engine, plan, batch)
            elif batch not in self.choices:
                self.choices[batch] = engine.choices(prompts, count)
            result |= self._floor(plan, batch, result["step_ms"]["median"])
            yield self._row("flexmoe", config, {"batch": batch}, result)
        for length in self.args.prompts:
            yield self._row("flexmoe", config, {"batch": 1, "prompt_len": length}, self._first_token(engine, length))
        if self.args.requests:
            many = {"batch": self.args.requests, "prompt_len": _MANY[0], "output_len": _MANY[1]}
            yield self._row("flexmoe", config, many, self._many(engine))
        if setup == AS_IT_COMES and self.args.hf:
            yield from self._hugging_face(engine)

    def _first_token(self, engine: Ours, length: int) -> Row:
        (prompt,) = make_prompts(self.subject.config.vocab_size, 1, length, self.args.seed)
        for _ in range(2):  # a GPU computes a length first as it comes, then records it
            engine.generate([prompt], 1)
        seconds = [_clock(engine, [prompt], 1)[0] for _ in range(REPEATS)]
        return {"first_token_ms": summary([1e3 * each for each in seconds]), "samples": REPEATS}

    def _many(self, engine: Ours) -> Row:
        """Once after a run of the same."""
        prompt_len, count = _MANY
        prompts = make_prompts(self.subject.config.vocab_size, self.args.requests, prompt_len, self.args.seed)
        engine.generate(prompts, count)
        seconds, tokens = _clock(engine, prompts, count)
        return {"seconds": round(seconds, 4), "output_tokens_per_s": round(sum(map(len, tokens)) / seconds, 2)}

    def _floor(self, plan: ParallelPlan, batch: int, step_ms: float) -> Row:
        """The time to read what a step must, each GPU its even share, all ranks on a CPU from the same memory."""
        choices, args = self.choices.get(batch), self.args
        if choices is None:
            return {}
        distinct = [sum(len(step.unique()) for step in steps) / len(steps) for steps in choices.by_layer.values()]
        context = mean_context(args.prompt_len, args.output_len)
        itemsize = getattr(torch, args.dtype).itemsize
        needed = floor(self.subject.config, batch, context, itemsize, distinct).total
        least = 1e3 * needed / self.bandwidth / (plan.num_ranks if args.device == "cuda" else 1)
        return {"floor_ms": round(least, 4), "percent_of_floor": round(100 * least / step_ms, 1)}

    def _spread(self, engine: Ours, plan: ParallelPlan, batch: int) -> Row:
        """What travels, beside the formulas, and how unevenly the work falls: if choices of experts are known."""
        config, choices = self.subject.config, self.choices.get(batch)
        sent = engine.sent(self.prompts[batch], self.args.output_len + 1)
        found: Row = {"sent_bytes_per_token": _rounded(sent), "sent_in_all": round(sum(sent.values()), 1)}
        if choices is not None and plan.data_parallel_size == 1:
            itemsize = getattr(torch, self.args.dtype).itemsize
            expected = formula(
                config, plan, batch, itemsize, choices, fused=engine.fused, one_shot=engine.one_shot
            )  # fmt: skip
            found["formula_bytes_per_token"] = _rounded(expected)
        return found if choices is None else found | {"imbalance": imbalance(config, plan, choices)}

    def _hugging_face(self, ours: Ours) -> Iterator[Row]:
        """As it comes, on the weights of one process."""
        weights = {name: param.data for name, param in ours.llm.engine.local_runner.model.named_parameters()}
        theirs = HuggingFace(self.subject.folder, self.subject.config, weights)
        for batch in self.prompts:
            yield self._row("hf-default", {"strategy": "one process"} | theirs.about(), {"batch": batch},
                            self._timed(theirs, batch))  # fmt: skip

    def _timed(self, engine: TimedEngine, batch: int) -> Row:
        prompts, count = self.prompts[batch], self.args.output_len
        tokens: list[list[int]] = []

        def seconds_for(length: int) -> float:
            nonlocal tokens
            seconds, tokens = _clock(engine, prompts, length)
            return seconds

        figures = step_times(seconds_for, batch, count)
        reference = self.answers.setdefault(batch, tokens)
        places = [first_difference(*pair) for pair in zip(reference, tokens, strict=True)]
        return figures | {
            "equal_answers": places.count(None),
            "first_difference": min((place for place in places if place is not None), default=None),
        }

    def _row(self, engine: str, config: Row, params: Row, result: Row) -> Row:
        args = self.args
        kind = "strategies" if "step_ms" in result or "error" in result else "strategies_prompts"
        row = {"benchmark": kind, "engine": engine, "model": self.subject.facts(), "params": asked(args) | params}
        note = {"note": args.note} if args.note else {}
        return row | {"config": config, "result": result} | note | self.facts


def chosen(args: argparse.Namespace) -> list[Setup]:
    """One process as it comes, and the strategies on ranks, of those that were asked for."""
    found = (AS_IT_COMES, *(setup for ranks in args.ranks for setup in setups(ranks)))
    return [setup for setup in found if any(only in setup.name for only in args.only.split(","))]


def predictions(subject: Subject, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of what the planner expects where a run would measure."""
    machine = Machine.load(args.predict)
    for setup in chosen(args):
        config = {"strategy": setup.name, "ranks": setup.plan.num_ranks, "plan": setup.plan.to_json()}
        row = {"benchmark": "strategies_predicted", "engine": "flexmoe", "model": subject.facts()}
        row |= {"config": config, "machine": machine.name} | facts()
        limits = SchedulerConfig(max_num_seqs=max(*args.batch, args.requests))
        try:
            expected = Expected(subject.name, subject.config, machine, setup.plan, args.dtype, limits)
        except ConfigError as error:
            yield row | {"params": asked(args), "result": {"error": str(error)}}
            continue
        context = args.prompt_len + (args.output_len + 1) // 2
        figures: list[tuple[Row, Row]] = [({"batch": batch}, expected.decode(batch, context)) for batch in args.batch]
        figures += [({"batch": 1, "prompt_len": length}, expected.first_token(length)) for length in args.prompts]
        if args.requests:
            many = {"batch": args.requests, "prompt_len": _MANY[0], "output_len": _MANY[1]}
            figures.append((many, expected.many(args.requests, *_MANY)))
        for params, result in figures:
            yield row | {"params": asked(args) | params, "result": result}


def _clock(engine: TimedEngine, prompts: Sequence[list[int]], count: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = engine.generate(prompts, count)
    return time.perf_counter() - start, tokens


def _agree(formula: Bytes | None, sent: Bytes | None) -> bool:
    """Whether bytes are the formula's. In 16 bits a near tie may fall to another expert than in one process."""
    if formula is None or sent is None:
        return True
    near = (math.isclose(formula[label], sent[label], rel_tol=2e-3) for label in formula if label in sent)
    return formula.keys() == sent.keys() and all(near)


def _rounded(figures: Bytes) -> Bytes:
    return {name: round(value, 2) for name, value in sorted(figures.items())}


def _served(prompts: Sequence[int], context: int) -> list[int]:
    """Lengths that leave room for a token. The others are named: one that is too long would have no engine start."""
    for length in prompts:
        if length >= context:
            print(f"No prompts of {length}: the model's context is of {context} tokens.", flush=True)
    return [length for length in prompts if length < context]


def _line(row: Row) -> str:
    config, result = row["config"], row["result"]
    name = f"{row['engine']}, {config['strategy']}, {config.get('ranks', 1)} ranks"
    if "error" in result:
        return f"{name}: {result['error']}"
    if "first_token_ms" in result and "step_ms" not in result:
        return f"{name}, a prompt of {row['params']['prompt_len']}: {middle(result['first_token_ms']):.2f} ms"
    if "seconds" in result:
        return f"{name}, {row['params']['batch']} requests: {result['output_tokens_per_s']} tokens/s"
    if "terms_ms" in result:
        return f"{name}, batch {row['params']['batch']}: {result['step_ms']:.2f} ms a step, predicted"
    same = _agree(result.get("formula_bytes_per_token"), result.get("sent_bytes_per_token"))
    sent = f", {result['sent_in_all']:.0f} bytes a token" if "sent_in_all" in result else ""
    return (
        f"{name}, batch {row['params']['batch']}: {result['step_ms']['median']:.2f} ms a step, "
        f"{result['tokens_per_s']} tokens/s, equal answers {result['equal_answers']}{sent}"
        + ("" if same else " (NOT the formula's)")
    )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_question(parser)
    parser.add_argument("--ranks", type=numbers, default=[2], help="numbers of ranks, e.g. 2,4")
    parser.add_argument("--only", default="", help="strategies with one of these in their name, e.g. tensor,all-reduce")
    parser.add_argument("--prompts", type=numbers, default=[], help="lengths of single prompts, e.g. 2048,8192")
    parser.add_argument("--requests", type=int, default=0, help="so many at once, of 512 tokens and 128 more")
    parser.add_argument("--predict", metavar="MACHINE", help="measure nothing; say what the planner expects there")
    parser.add_argument("--kv-cache-memory", type=int, default=2**26, help="bytes of each process on a CPU")
    parser.add_argument("--hf", action="store_true", help="Hugging Face transformers beside it")
    parser.add_argument("--note", help="goes into every row: what else the machine was doing")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, and append rows."""
    args = arguments(words)
    with open_subject(args.model, changes=Changes(layers=args.layers)) as subject:
        args.prompts = _served(args.prompts, subject.config.max_position)
        for row in predictions(subject, args) if args.predict else Bench(subject, args).rows():
            print(_line(row), flush=True)
            if args.out:
                append(args.out, row)


if __name__ == "__main__":
    main()
