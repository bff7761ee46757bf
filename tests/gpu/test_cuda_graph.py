"""Decode steps as CUDA graphs: what they compute is what the kernels compute one by one, and the host never waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmoe import LLM, ConfigError, EngineError, SamplingParams
from flexmoe.config.routing import LayerLoad
from flexmoe.engine.cuda_graph import GraphedDecoder, bucket_of
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.layers.forward_batch import Probe
from tests.cpu.tiny_models import tiny
from tests.kernels.support import refusing_to_wait

PROMPTS = [[5, 17, 230, 9, 44], [11] * 3, list(range(3, 40)), [7, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, seed=3, max_tokens=24, ignore_eos=True)


def make(name: str = "mixtral", dtype: str = "bfloat16") -> LLM:
    return LLM(str(tiny(name)), dtype=dtype, device="cuda", num_blocks=64)


def answers(llm: LLM, params: SamplingParams = GREEDY) -> tuple[list[tuple[int, ...]], Tensor]:
    """Tokens, and the logits of the last step."""
    tokens = [output.token_ids for output in llm.generate(PROMPTS, params)]
    return tokens, graphed(llm)._model.logits[: len(PROMPTS)].clone()


def graphed(llm: LLM) -> GraphedDecoder:
    found = llm.engine.runner._graphed
    assert found is not None
    return found


@contextmanager
def without_graphs() -> Iterator[None]:
    def run(self: GraphedDecoder, form: Any, packed: PackedRows, probe: Probe | None) -> None:
        self._step(form, packed, probe)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedDecoder, "_run", run)
        yield


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_graphs_compute_the_bits_that_eager_kernels_do(name: str, params: SamplingParams) -> None:
    with make(name) as llm:
        captured = answers(llm, params)
        assert graphed(llm)._graphs
    with without_graphs(), make(name) as llm:
        eager = answers(llm, params)
        assert not graphed(llm)._graphs
    assert captured[0] == eager[0]
    assert torch.equal(captured[1], eager[1])


def test_two_runs_give_the_same_bits() -> None:
    with make() as llm:
        first, second = answers(llm), answers(llm)
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_running_ahead_changes_no_token(params: SamplingParams) -> None:
    with make() as llm:
        ahead = answers(llm, params)[0]
        assert llm.engine.runner.can_run_ahead
    with pytest.MonkeyPatch.context() as patch, make() as llm:
        patch.setattr(type(llm.engine.runner), "can_run_ahead", lambda *args: False)
        assert answers(llm, params)[0] == ahead


@pytest.mark.parametrize("one_pass", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_prompts_in_steps_that_are_launched_ahead_change_no_token(params: SamplingParams, one_pass: bool) -> None:
    """Three seats and eight tokens a step, so that prompts come in pieces beside others' decodes, all the time."""
    tight = {"dtype": "float32", "device": "cuda", "num_blocks": 64, "max_num_seqs": 3, "max_num_batched_tokens": 8}
    tight |= {"one_pass": one_pass, "prompts_ahead": True}
    found = []
    for ahead in (True, False):
        with pytest.MonkeyPatch.context() as patch, LLM(str(tiny("mixtral")), **tight) as llm:
            assert llm.engine.runner.mixes_ahead
            launches: list[Any] = []
            mixed = GraphedDecoder.launch_mixed
            patch.setattr(
                GraphedDecoder, "launch_mixed", lambda *args, m=mixed, kept=launches: kept.append(args) or m(*args)
            )
            if not ahead:
                patch.setattr(type(llm.engine.runner), "can_run_ahead", lambda *args: False)
            found.append([output.token_ids for output in llm.generate(PROMPTS * 2, params)])
            assert any(sources is not None for _, _, _, sources, *_ in launches) is ahead
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_prompts_as_graphs_compute_the_bits_of_eager_kernels(name: str) -> None:
    """The first time a form comes it is launched kernel by kernel, then recorded, then replayed."""
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=4, ignore_eos=True)
    prompts = [[5, 17, 230, 9], [11] * 23, list(range(3, 40))]
    with LLM(str(tiny(name)), dtype="bfloat16", device="cuda", num_blocks=64, enable_prefix_caching=False) as llm:
        answers = [llm.generate(prompts, params) for _ in range(4)]
        others = llm.generate(prompts[1:], params)  # another form
        again = llm.generate(prompts, params)
        graphs = llm.engine.runner._prompts._graphs  # type: ignore[union-attr]
    assert any(graph is not None for graph in graphs.values())
    assert len(graphs) >= 2
    for answer in [*answers[1:], again]:
        for ours, first in zip(answer, answers[0], strict=True):
            assert ours.outputs == first.outputs
    assert len(others) == 2


def test_no_step_waits_for_the_device() -> None:
    """Only the wait for a step's tokens may, which no torch operation does."""
    with make() as llm:
        for prompt in PROMPTS:
            llm.engine.add_request(prompt, GREEDY)
        for _ in range(6):
            llm.engine.step()
        with refusing_to_wait():
            for _ in range(8):
                llm.engine.step()


def test_a_request_alone_and_among_others_in_fp32() -> None:
    with make(dtype="float32") as llm:
        together = answers(llm)[0]
        alone = [llm.generate([prompt], GREEDY)[0].token_ids for prompt in PROMPTS]
    assert alone == together


def test_logprobs_and_penalties_take_the_host_way() -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, repetition_penalty=1.3, ignore_eos=True)
    found = []
    for device in ("cpu", "cuda"):
        with LLM(str(tiny("mixtral")), dtype="float32", device=device, num_blocks=64) as llm:
            found.append([output.token_ids for output in llm.generate(PROMPTS, params)])
    assert found[0] == found[1]


def test_damaged_weights_end_in_an_error_not_in_a_token() -> None:
    with make() as llm:
        answers(llm)
        llm.engine.runner.model.norm.weight.data.fill_(torch.nan)
        with pytest.raises(EngineError, match="not numbers"):
            llm.generate(PROMPTS, GREEDY)


def test_more_memory_than_there_is_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="of memory are free") as refusal:
        LLM(str(tiny("mixtral")), device="cuda", num_blocks=10**10)
    assert "\n" not in str(refusal.value)


def test_buckets_hold_their_rows() -> None:
    assert [bucket_of(n) for n in (1, 3, 8, 9, 33, 65, 129, 256)] == [1, 3, 8, 12, 40, 80, 160, 256]


def test_counting_experts_keeps_graphs_and_tokens_and_counts_what_a_cpu_does() -> None:
    def recorded(device: str, **options: Any) -> tuple[list[Any], list[LayerLoad], int]:
        found: list[Any] = []
        with LLM(str(tiny("qwen2_moe")), dtype="float32", device=device, num_blocks=64, **options) as llm:
            with llm.record_routing() as recorder:
                found = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
            graphs = len(graphed(llm)._graphs) if device == "cuda" else 0
            return found, recorder.loads(), graphs

    tokens, loads, graphs = recorded("cuda")
    assert graphs > 0
    assert (tokens, loads) == recorded("cpu", expert_backend="reference")[:2]
