"""Engines behind one interface. Enters: prompts of token ids. Leaves: when tokens came, and which.

Used inside of a worker process (worker.py): one model in one configuration.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

_ASLEEP = 0.03  # seconds


@dataclass(frozen=True)
class Timed:
    """One call. first: seconds until every prompt had its first token; total: until all had their last."""

    first: float
    total: float
    tokens: list[list[int]]


class TimedEngine(Protocol):
    """A loaded model."""

    def about(self) -> dict[str, Any]:
        """What it says of itself: dtype chosen, kernels used."""

    def generate(self, prompts: list[list[int]], max_tokens: int, variant: dict[str, Any]) -> Timed:
        """Greedy, exactly `max_tokens` for each prompt, whatever the tokens are."""


class FlexMoEEngine:
    """Ours, by its public interface. Prefixes are not cached: no round may profit from an earlier one."""

    def __init__(self, model: str, dtype: str, threads: int, max_num_seqs: int) -> None:
        from flexmoe import LLM

        self._llm = LLM(
            model, dtype=dtype, threads=threads, max_num_seqs=max_num_seqs, enable_prefix_caching=False, device="cpu"
        )

    def about(self) -> dict[str, Any]:
        return self._llm.describe()

    def generate(self, prompts: list[list[int]], max_tokens: int, variant: dict[str, Any]) -> Timed:
        from flexmoe import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        start = time.monotonic()
        outputs = self._llm.generate(prompts, params)
        end = time.monotonic()
        first = max(output.metrics.first_token or end for output in outputs)
        return Timed(first - start, end - start, [list(output.token_ids) for output in outputs])

    def distinct_experts(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
        """Of each MoE layer, how many experts a decode step of these prompts reads, on average."""
        from flexmoe.bench.engines import distinct_experts

        return distinct_experts(self._llm.engine, prompts, max_tokens)


class TransformersEngine:
    """Hugging Face transformers' generate(). variant: {"cache": "dynamic" or "static", "compile": mode or None}."""

    def __init__(self, model: str, dtype: str, threads: int, experts: str) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), experts_implementation=experts, local_files_only=True
        ).eval()
        # A private configuration, free of the model's own stops and penalties: the length is what was asked for.
        self._model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)

    def about(self) -> dict[str, Any]:
        config = self._model.config
        return {"attention": config._attn_implementation, "experts": config._experts_implementation}

    def generate(self, prompts: list[list[int]], max_tokens: int, variant: dict[str, Any]) -> Timed:
        import torch
        from transformers import StoppingCriteriaList

        clock = _clock()
        ids = torch.tensor(prompts)
        start = time.monotonic()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **self._options(variant, len(prompts[0]) + max_tokens),
        )
        end = time.monotonic()
        return Timed(clock.first - start, end - start, out[:, ids.shape[1] :].tolist())

    def _options(self, variant: dict[str, Any], length: int) -> dict[str, Any]:
        """A static cache is made anew for each call, as generate() does, but never longer than needed."""
        from transformers import CompileConfig, StaticCache

        options: dict[str, Any] = {}
        if variant.get("cache") == "static":
            options["past_key_values"] = StaticCache(config=self._model.config, max_cache_len=length)
        if variant.get("compile"):
            # Every shape is compiled for itself: the best code for each, at the price of warm-up that is not counted.
            # Not with eager experts: their shapes change with every token, and torch would soon give up.
            dynamic = None if self._model.config._experts_implementation == "eager" else False
            compile_config = CompileConfig(mode=variant["compile"], dynamic=dynamic)
            compile_config._compile_all_devices = True  # on a CPU generate() does not compile otherwise
            options["compile_config"] = compile_config
        return options


def _clock() -> Any:
    """A stopping criterion that never stops and notes when it was first asked: the first tokens are there."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        first = 0.0
        _go_on = None

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            if self._go_on is None:
                self.first = time.monotonic()
                self._go_on = torch.zeros(input_ids.shape[0], dtype=torch.bool)
            return self._go_on

    return Clock()


class PlainStream:
    """No engine: memory read from one end to the other, by as many threads as the engines have."""

    def __init__(self, threads: int) -> None:
        import torch

        from flexmoe.bench.bandwidth import CpuStream

        torch.set_num_threads(threads)
        self._stream = CpuStream()

    def about(self) -> dict[str, Any]:
        return {}

    def rates(self, count: int) -> list[float]:
        """Bytes a second of so many reads. One more before them finds the threads asleep, and does not count.

        Returns when they sleep again: OpenMP's threads stay awake for some milliseconds, on a core that others need.
        """
        found = [self._stream.read() for _ in range(count + 1)][1:]
        time.sleep(_ASLEEP)
        return found


def make_engine(kind: str, options: dict[str, Any]) -> TimedEngine | PlainStream:
    """kind: "flexmoe", "transformers", "llama.cpp" or "stream"."""
    if kind == "llama.cpp":
        from harness.llama import LlamaCppEngine  # imports what the environment of the others need not have

        return LlamaCppEngine(**options)
    if kind == "stream":
        return PlainStream(**options)
    return {"flexmoe": FlexMoEEngine, "transformers": TransformersEngine}[kind](**options)
