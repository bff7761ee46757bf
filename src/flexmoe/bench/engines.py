"""Our engine, as a benchmark drives it. Enters: a Subject. Leaves: tokens, times of steps, experts touched."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flexmoe.bench.subject import Subject
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError
from flexmoe.llm import LLM

Prompts = Sequence[list[int]]


class TimedEngine(Protocol):
    """A loaded model of any engine."""

    def generate(self, prompts: Prompts, count: int) -> list[list[int]]:
        """Greedy: exactly `count` tokens for each prompt, whatever they are."""
        ...

    def about(self) -> dict[str, Any]:
        """How it is set up."""
        ...


class FlexMoE:
    """Ours, through `LLM`. No prefix cache: every call computes its prompts."""

    def __init__(self, subject: Subject, options: dict[str, Any]) -> None:
        """options: of `LLM`. seconds: how long it took until the model was ready."""
        start = time.perf_counter()
        model, load_format = str(subject.folder), subject.load_format
        # What compiles in the background would be measured, too.
        quiet = {"enable_prefix_caching": False, "compile_ahead": False}
        self._llm = LLM(model, load_format=load_format, **quiet, **options)
        self.seconds = time.perf_counter() - start
        self._about = self._llm.describe() | {"model": subject.name}
        runner = self._llm.engine.local_runner
        self.device = runner.device
        self.dtype: torch.dtype = runner.model.norm.weight.dtype

    def about(self) -> dict[str, Any]:
        return self._about

    @property
    def engine(self) -> Engine:
        """The engine itself, to be driven step by step."""
        return self._llm.engine

    def generate(self, prompts: Prompts, count: int) -> list[list[int]]:
        outputs = self._llm.generate(list(prompts), greedy(count))
        return [list(output.token_ids) for output in outputs]

    def step_seconds(self, prompts: Prompts, count: int) -> list[float]:
        """Gaps between the steps in which all prompts together get one more token each."""
        marks: list[float] = []
        _serve(self.engine, prompts, count, lambda: marks.append(time.perf_counter()))
        return [after - before for before, after in itertools.pairwise(marks)]

    def distinct_experts(self, prompts: Prompts, count: int) -> list[float]:
        """D of each MoE layer, see `distinct_experts` below."""
        return distinct_experts(self.engine, prompts, count)

    def release(self) -> dict[str, Tensor]:
        """Close the engine, which frees its KV cache, and hand over the weights by name.

        Raises ConfigError if the engine put them into a layout of its own.
        """
        model = self._llm.engine.local_runner.model
        weights = {name: parameter.data for name, parameter in model.named_parameters()}
        complete = sum(weight.numel() for weight in weights.values()) == self._llm.config.num_parameters()
        del model
        self.close()
        if not complete:
            raise ConfigError("the engine packed its weights, so no other engine can share them (no C kernels here?).")
        return weights

    def close(self) -> None:
        """Free everything but what others hold."""
        self._llm.close()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def distinct_experts(engine: Engine, prompts: Prompts, count: int) -> list[float]:
    """D of each MoE layer: experts that any row of a decode step chose, on average over the steps.

    Only steps in which all prompts decode count; empty without experts, and if there was no such step.
    """
    counter = ExpertCounter(len(prompts))

    def watch() -> None:
        engine.local_runner.probe = counter

    try:
        _serve(engine, prompts, count, watch)
    finally:
        engine.local_runner.probe = None
    return counter.means()


def _serve(engine: Engine, prompts: Prompts, count: int, decoding: Callable[[], None]) -> None:
    """Serve the prompts together; call `decoding` after each step while all of them decode."""
    # The last prompt's first token is the last of all first tokens; a stream shows when it comes.
    last = len(prompts) - 1
    ids = [engine.add_request(ids, greedy(count), stream=i == last) for i, ids in enumerate(prompts)]
    all_run = True
    while engine.has_unfinished:
        outputs = engine.step()
        all_run &= not any(output.finished for output in outputs)
        if all_run and any(output.request_id == ids[-1] for output in outputs):
            decoding()


class ExpertCounter:
    """A probe that counts distinct experts, in the passes that hold at least `rows` rows; those behind are padding."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._counts: dict[int, list[int]] = {}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if stage == "topk_ids" and len(tensor) >= self._rows:
            chosen = tensor[: self._rows]
            self._counts.setdefault(layer, []).append(chosen[chosen >= 0].unique().numel())

    def means(self) -> list[float]:
        """Over the passes, layer by layer."""
        return [sum(counts) / len(counts) for _, counts in sorted(self._counts.items())]


def greedy(count: int) -> SamplingParams:
    """Exactly `count` tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
