"""Threads of the C kernels and of torch: engines side by side, idle ones idle, and nobody changes another's threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.config.model import LayerConfig
from flexmoe.engine.device import physical_cores
from flexmoe.errors import EngineError
from flexmoe.kernels.cpu.decode import _pool
from flexmoe.models.decoder import Decoder
from tests.cpu.paging import scattered
from tests.cpu.tiny_decoders import NEEDS_COMPILER, by_c, config, decoder, filled_cache
from tests.cpu.tiny_models import tiny

pytestmark = NEEDS_COMPILER
TWO = min(2, physical_cores())
MOE, DENSE = LayerConfig(is_moe=True), LayerConfig(is_moe=False)


def steps(model: Decoder, rows: int) -> Callable[[], torch.Tensor]:
    """A decode step of so many rows, as a function."""
    dtype = model.embed_tokens.weight.dtype
    requests, num_blocks = scattered(range(3, 3 + rows), 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, dtype)
    return lambda: by_c(model, requests, cache)


@pytest.mark.parametrize("threads", [(1, 1), (2, 2), (2, 3)])
def test_two_models_in_two_threads(threads: tuple[int, int]) -> None:
    """They share a pool if they use as many threads: its scratch memory must serve one step at a time."""
    small = decoder(config(layers=(MOE,)), torch.float32, threads[0])
    large = decoder(config(hidden_size=200, vocab_size=333, layers=(DENSE, MOE)), torch.bfloat16, threads[1])
    work = [steps(small, 1), steps(large, 9)]
    wanted = [step() for step in work]
    start = threading.Barrier(2)

    def many(step: Callable[[], torch.Tensor], expected: torch.Tensor) -> int:
        start.wait()
        return sum(torch.equal(step(), expected) for _ in range(200))

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(many, work, wanted)) == [200, 200]


def generate(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    return [list(output.token_ids) for output in llm.generate(prompts, params)]


def test_two_engines_in_two_threads() -> None:
    """Prefills in torch and decodes in C, at once: both get the tokens they get alone."""
    prompts = [[5, 6, 7, 8], [9] * 20, [3]]
    start = threading.Barrier(2)

    def many(llm: LLM) -> list[list[list[int]]]:
        start.wait()
        return [generate(llm, prompts) for _ in range(6)]

    with LLM(str(tiny("mixtral")), threads=TWO) as one, LLM(str(tiny("qwen3_moe")), threads=TWO) as other:
        assert one.describe()["decode_kernels"].startswith("C (")
        wanted = [[generate(llm, prompts)] * 6 for llm in (one, other)]
        with ThreadPoolExecutor(2) as executor:
            assert list(executor.map(many, [one, other])) == wanted


def test_each_step_runs_with_the_threads_of_its_engine() -> None:
    """Torch counts threads for each thread of Python, and a new one begins with what any other set last."""
    seen: set[int] = set()

    class Probe:
        def record(self, stage: str, layer: int, tensor: torch.Tensor) -> None:
            seen.add(torch.get_num_threads())

    def prefill(llm: LLM) -> int:
        llm.engine.runner.probe = Probe()
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
        llm.engine.runner.probe = None
        generate(llm, [[1, 2]])
        return torch.get_num_threads()

    with LLM(str(tiny("mixtral")), threads=TWO) as llm, ThreadPoolExecutor(1) as executor:
        torch.set_num_threads(1)  # as another engine does while it decodes
        assert executor.submit(prefill, llm).result() == TWO
    assert seen == {TWO}


def test_a_forked_engine_is_refused_instead_of_waiting_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(tiny("mixtral")), threads=1) as llm:
        here = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: here + 1)
        with pytest.raises(EngineError, match="before this process was forked"):
            generate(llm, [[1, 2]])
        monkeypatch.undo()
        assert len(generate(llm, [[1, 2]])[0]) == 30


def test_an_idle_engine_is_idle() -> None:
    step = steps(decoder(config(), threads=3), 4)
    for _ in range(50):
        step()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1, "threads spin while there is nothing to do"


def test_work_after_a_pause_wakes_the_threads() -> None:
    step = steps(decoder(config(), threads=3), 4)
    wanted = step()
    for pause in (0.0, 0.001, 0.02, 0.2) * 3:
        time.sleep(pause)
        assert torch.equal(step(), wanted)


def test_engines_of_as_many_threads_share_them() -> None:
    decoder(config(), threads=2)
    before = threading.active_count(), len(_threads())
    for _ in range(5):
        steps(decoder(config(), threads=2), 2)()
    assert (threading.active_count(), len(_threads())) == before
    assert _pool(2, "auto") == _pool(2, "auto") != _pool(3, "auto")


def _threads() -> list[str]:
    """The ids of the process's threads, those of C included."""
    return [path.name for path in Path("/proc/self/task").iterdir()]
