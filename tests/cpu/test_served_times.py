"""benchmarks/served_times.py: its engine's steps take the time that they are said to, and loads are foretold so."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import ModuleType

import pytest

from flexmoe.bench.load import LoadOptions
from flexmoe.config.sampling import SamplingParams
from flexmoe.config.serving import Serving

_TOKENS = 6


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("served_times")


def test_steps_take_as_long_as_they_are_said_to(script: ModuleType) -> None:
    engine = script.timed_engine({"device": "cpu", "threads": 1})
    engine.add_request([5] * 100, SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True), stream=True)
    start, outputs = time.monotonic(), []
    while engine.has_unfinished:
        outputs += engine.step()
    took = time.monotonic() - start
    assert len(outputs[-1].token_ids) == _TOKENS
    assert took >= 5.5e-3 + (_TOKENS - 1) * 1.52e-3
    engine.close()


def test_the_same_engine_is_foretold(script: ModuleType) -> None:
    engine = {
        "max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 1024, "kv_cache_blocks": 500,
        "block_size": 16, "prefix_caching": True, "prompts_ahead": True,
    }  # fmt: skip
    load = LoadOptions(rate=1.0, num_requests=1, input_len=(100, 100), output_len=(_TOKENS, _TOKENS))
    alone, served = (script.figures(script.foretold(load, engine, serving)) for serving in (None, Serving(2e-3)))
    assert alone["ttft_mean"] == pytest.approx(5.5)
    assert alone["tpot_p50"] == pytest.approx(1.52)
    assert served["ttft_p50"] == pytest.approx(7.5)
    assert served["tpot_mean"] == pytest.approx(1.52)
