"""Latency: milliseconds a decode step takes, beside what memory allows and beside other engines.

Enters: LatencyOptions. Leaves: rows, one for each engine and batch size, as soon as it is measured.

All prompts of a batch start together and get exactly as many tokens. A step of ours is the mean of those timed one by
one, in the better of two runs. Others are timed as a whole: (time for N + 1 tokens - time for 1) / N, each the best of
two, which leaves prompts out, but not by how much two runs of long ones differ. The floor counts the experts that the
same requests really touched. Other engines compute with the weights of ours, so that tokens can be compared.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from flexmoe.bench import hugging_face
from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.engines import FlexMoE, Prompts, TimedEngine
from flexmoe.bench.hugging_face import HuggingFace
from flexmoe.bench.peak import matrix_peak
from flexmoe.bench.record import facts, summary
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts
from flexmoe.config.engine import CacheConfig
from flexmoe.engine.device import choose_device, set_threads
from flexmoe.errors import ConfigError
from flexmoe.planner.floor import Floor, expected_distinct, floor, mean_context, prompt_flops
from flexmoe.scheduling.roofline import StepTokens

Row = dict[str, Any]

OURS, HF_BEST, HF_DEFAULT = ENGINES = ("flexmoe", "hf-best", "hf-default")
_REPEATS = 2
_TOO_BUSY = "the machine was too busy to measure; run again to try this one anew"
_WARMUPS, _WARMUPS_COMPILED = 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """Lengths in tokens. hf_seconds: for each batch, until when another configuration of hf-best may be tried.

    prompt: token ids that all rows are given, as long as prompt_len; None: random ones. llm: further options of `LLM`.
    """

    model: str | None = None
    load_format: str = "auto"
    changes: Changes = field(default_factory=Changes)
    engines: Sequence[str] = (OURS,)
    batches: Sequence[int] = (1, 8, 32, 128)
    prompt_len: int = 128
    prompt: Sequence[int] | None = None
    output_len: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    hf_seconds: float = 240
    llm: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for engine in self.engines:
            if engine not in ENGINES:
                raise ConfigError(f"engine={engine!r} is not one of {', '.join(ENGINES)}.")
        if self.prompt is not None and len(self.prompt) != self.prompt_len:
            raise ConfigError(f"prompt_len={self.prompt_len} is not the prompt's length; use {len(self.prompt)}.")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: a step, and all prompts' first tokens. tokens: what each prompt was answered."""

    step: float
    first: float
    tokens: list[list[int]]


@dataclass(frozen=True, slots=True)
class Touched:
    """distinct: D of each MoE layer. counted: in a run; else what uniform routing gives, for lack of a full step."""

    floor: Floor
    distinct: list[float]
    counted: bool


def measure(options: LatencyOptions, notify: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Load the model, then measure engine by engine. notify: hears of each stage.

    Raises what `LLM` raises for a model that cannot be served, MissingDependencyError for an engine not installed.
    """
    if set(options.engines) != {OURS}:
        hugging_face.import_transformers()
    with open_subject(options.model, options.load_format, options.changes) as subject:
        yield from _Bench(subject, options, notify).rows()


class _Bench:
    """One run: its subject, and by batch size what engines have in common."""

    def __init__(self, subject: Subject, options: LatencyOptions, notify: Callable[[str], None]) -> None:
        self.subject, self.options, self.notify = subject, options, notify
        self.device = choose_device(options.device)
        set_threads(options.threads)
        self.ceiling = read_bandwidth(self.device)  # before the weights: it needs memory of its own
        self.facts = facts(self.device)
        self.prompts = {batch: self._prompts(batch) for batch in options.batches}
        self.touched: dict[int, Touched] = {}
        self.answers: dict[int, list[list[int]]] = {}  # of our engine
        self.dtype = ""

    def _prompts(self, batch: int) -> list[list[int]]:
        options = self.options
        if options.prompt is not None:
            return [list(options.prompt)] * batch
        return make_prompts(self.subject.config.vocab_size, batch, options.prompt_len, options.seed)

    def rows(self) -> Iterator[Row]:
        options = self.options
        self.notify(f"{self.subject.label}: loading")
        ours = FlexMoE(self.subject, self._llm_options())
        self.dtype = str(ours.dtype).removeprefix("torch.")
        yield from self._ours(ours)
        others = [engine for engine in options.engines if engine != OURS]
        if not others:
            ours.close()
            return
        theirs = HuggingFace(self.subject.folder, self.subject.config, ours.release())
        for batch in options.batches:
            for engine in others:
                yield self._theirs(theirs, engine, batch)

    def _llm_options(self) -> dict[str, Any]:
        options = self.options
        longest = options.prompt_len + options.output_len + 1
        # One block more for each than it needs: the scheduler admits nobody without one to spare for those that run.
        blocks = max(options.batches) * (-(-longest // CacheConfig().block_size) + 1)
        prompts = max(options.batches) * options.prompt_len  # all in one step: the next ones only decode
        return {
            "dtype": options.dtype,
            "device": options.device,
            "threads": options.threads,
            "seed": options.seed,
            "max_num_seqs": max(options.batches),
            "max_model_len": longest,
            "num_blocks": blocks,
            "max_num_batched_tokens": max(prompts, StepTokens().most),
            **options.llm,
        }

    # ------------------------------------------------------------------ engines

    def _ours(self, engine: FlexMoE) -> Iterator[Row]:
        """Rows of our engine if asked for; what is touched is counted in any case."""
        count = self.options.output_len + 1
        start = time.perf_counter()
        engine.generate([self.prompts[min(self.prompts)][0]], 1)
        started = {"ready_s": engine.seconds, "first_token_s": engine.seconds + time.perf_counter() - start}
        for batch, prompts in self.prompts.items():
            self.notify(f"flexmoe: batch {batch}")
            row: Row | None = None
            if OURS in self.options.engines:
                _forget_peak(self.device)
                timing = self._time(engine, prompts, _WARMUPS)
                steps = min((engine.step_seconds(prompts, count) for _ in range(_REPEATS)), key=sum)
                row = {"peak_memory_gib": _peak_memory(self.device)}
                row["step_ms"] = summary([1e3 * step for step in steps]) if steps else None
                timing = replace(timing, step=statistics.fmean(steps)) if steps else timing
                self.answers[batch] = timing.tokens
            self.touched[batch] = self._touched(batch, engine.dtype.itemsize, engine.distinct_experts(prompts, count))
            if row is not None:
                yield self._row(OURS, batch, engine.about(), self._result(batch, timing) | row | _rounded(started))

    def _theirs(self, engine: HuggingFace, name: str, batch: int) -> Row:
        """The default configuration, or the best of those that could be tried in time."""
        setups = [hugging_face.DEFAULT]
        if name == HF_BEST:
            setups = hugging_face.candidates(self.subject.config, batch, self.device)
        end = time.monotonic() + self.options.hf_seconds
        tried: Row = {}
        best: tuple[Timing, Row] | None = None
        for setup in setups:
            if tried and time.monotonic() > end:
                tried[str(setup)] = "not tried: out of time"
                continue
            compiling = " (compiling takes minutes)" if setup.compiled else ""
            self.notify(f"{name}: batch {batch}, {setup}{compiling}")
            _forget_peak(self.device)
            try:
                timing = self._time_setup(engine, setup, batch)
            except Exception as error:  # noqa: BLE001 - what a version or a machine cannot run is part of the answer
                tried[str(setup)] = _told(error)
                continue
            if timing.step <= 0:
                tried[str(setup)] = _TOO_BUSY
                continue
            tried[str(setup)] = round(1e3 * timing.step, 4)
            if best is None or timing.step < best[0].step:
                best = timing, engine.about() | {"peak_memory_gib": _peak_memory(self.device)}
        config: Row = {"tried": tried} | (best[1] if best else {})
        if best is None:
            return self._row(name, batch, config, {"error": "; ".join(map(str, tried.values()))})
        result = self._result(batch, best[0]) | {"peak_memory_gib": config.pop("peak_memory_gib")}
        return self._row(name, batch, config, result)

    def _time_setup(self, engine: HuggingFace, setup: hugging_face.Setup, batch: int) -> Timing:
        engine.use(setup)
        engine.reserve(batch, self.options.prompt_len + self.options.output_len + 1)
        return self._time(engine, self.prompts[batch], _WARMUPS_COMPILED if setup.compiled else _WARMUPS)

    # ------------------------------------------------------------------ figures

    def _time(self, engine: TimedEngine, prompts: Prompts, warmups: int) -> Timing:
        count = self.options.output_len
        for _ in range(warmups):
            engine.generate(prompts, count + 1)
        engine.generate(prompts, 1)
        first, _ = min((_timed(engine, prompts, 1) for _ in range(_REPEATS)), key=_seconds)
        total, tokens = min((_timed(engine, prompts, count + 1) for _ in range(_REPEATS)), key=_seconds)
        return Timing((total - first) / count, first, tokens)

    def _touched(self, batch: int, itemsize: int, distinct: list[float]) -> Touched:
        """What the average step reads."""
        config = self.subject.config
        expected = expected_distinct(config, batch)
        context = mean_context(self.options.prompt_len, self.options.output_len)
        needed = floor(config, batch, context, itemsize, distinct or expected)
        return Touched(needed, distinct or expected, counted=len(distinct) == len(expected))

    def _first_floor(self, batch: int) -> float:
        """Seconds that the prompts need: to read all their weights, or to multiply, whichever takes longer."""
        config, length, dtype = self.subject.config, self.options.prompt_len, getattr(torch, self.dtype)
        distinct = expected_distinct(config, batch * length)
        read = floor(config, batch, 0, dtype.itemsize, distinct).total / self.ceiling
        return max(read, prompt_flops(config, batch, length) / matrix_peak(self.device, dtype))

    def _result(self, batch: int, timing: Timing) -> Row:
        if timing.step <= 0:  # more tokens took less time than one: whatever was measured, it was not this engine
            return {"error": _TOO_BUSY}
        touched = self.touched[batch]
        least, first_floor = touched.floor.total / self.ceiling, self._first_floor(batch)
        figures = {
            "ms": 1e3 * timing.step,
            "tokens_per_s": batch / timing.step,
            "first_token_ms": 1e3 * timing.first,
            "floor_ms": 1e3 * least,
            "percent_of_floor": 100 * least / timing.step,
            "first_token_floor_ms": 1e3 * first_floor,
            "percent_of_first_token_floor": 100 * first_floor / timing.first,
            "distinct_experts": sum(touched.distinct) / max(1, len(touched.distinct)),
        }
        result = _rounded(figures) | {
            "floor_bytes": asdict(touched.floor),
            "distinct_by_layer": [round(distinct, 2) for distinct in touched.distinct],
            "distinct_counted": touched.counted,
            "read_gb_s": round(self.ceiling / 1e9, 1),
        }
        return result | self._compared(batch, timing.tokens)

    def _compared(self, batch: int, tokens: list[list[int]]) -> Row:
        """Answers that equal ours, token for token; and where the first that does not goes another way."""
        ours = self.answers.get(batch)
        if ours is None or ours is tokens:
            return {}
        differences = [first_difference(mine, theirs) for mine, theirs in zip(ours, tokens, strict=True)]
        places = [place for place in differences if place is not None]
        return {"equal_answers": len(tokens) - len(places), "first_difference": min(places, default=None)}

    def _row(self, engine: str, batch: int, config: Row, result: Row) -> Row:
        options = self.options
        lengths = {"batch": batch, "prompt_len": options.prompt_len, "output_len": options.output_len}
        params = {**lengths, "dtype": self.dtype, "seed": options.seed}
        about = {"benchmark": "latency", "engine": engine, "model": self.subject.facts(), "params": params}
        return about | {"config": config, "result": result} | self.facts


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that is another; None if there is none."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (mine, other) in pairs if mine != other), None)


def _timed(engine: TimedEngine, prompts: Prompts, count: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = engine.generate(prompts, count)
    return time.perf_counter() - start, tokens


def _seconds(timed: tuple[float, list[list[int]]]) -> float:
    return timed[0]


def _told(error: Exception) -> str:
    """The kind of an error and its first line. Frees what its frames hold: an error of memory must not be the last."""
    lines = str(error).strip().splitlines()
    error.__traceback__ = None
    gc.collect()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> float:
    """GiB: on a GPU what tensors took since the peak was forgotten, on a CPU the largest the process ever was."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # Linux counts in KiB


def _rounded(figures: dict[str, float]) -> Row:
    return {name: round(value, 4) for name, value in figures.items()}
