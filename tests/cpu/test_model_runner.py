"""ModelRunner: which chunks go through the C kernels and which through torch, and that the tokens come in order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from flexmoe.config.model import LayerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine import model_runner, prompt_graphs
from flexmoe.engine.model_runner import ModelRunner, _after_pending
from flexmoe.engine.prompt_graphs import GraphedPrompts
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.engine.together import DecodeTraits, Together
from flexmoe.models.decoder import Decoder
from flexmoe.models.hopper import HopperKernels
from flexmoe.models.native import NativeDecoder, most_rows
from flexmoe.models.presets import PRESETS
from flexmoe.scheduling.step import ScheduledChunk, Step
from tests.cpu.nearness import assert_near
from tests.cpu.paging import decodes, scattered, slot
from tests.cpu.rerun_graphs import NEEDS_INTERPRETER, RerunPool
from tests.cpu.tiny_decoders import CPU, NEEDS_COMPILER, Recording, config, copy_cache, decoder, filled_cache, in_fp32

pytestmark = NEEDS_COMPILER
BLOCK = 4
CONFIG = config(layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=False)))


class Watched:
    """Native kernels that note how many rows they were given."""

    def __init__(self, native: NativeDecoder, max_rows: int, *, prompts: bool = False) -> None:
        self._native, self.max_rows, self.prompts, self.calls = native, max_rows, prompts, list[int]()

    def __call__(self, rows: Any, *rest: Any, **options: Any) -> torch.Tensor:
        self.calls.append(len(rows.token_ids))
        return self._native(rows, *rest, **options)


def make_step(num_decodes: int, num_prefills: int, *, samples: bool = True) -> tuple[Step, int]:
    """Requests that decode, then prefills of 3 tokens with a prefix; and how many blocks they need.

    The last of several prefills does not reach its request's end, nor does any unless `samples`.
    """
    requests, num_blocks = scattered([6 + 3 * i for i in range(num_decodes + num_prefills)], BLOCK, CONFIG.vocab_size)
    chunks = decodes(requests[:num_decodes])
    for r in requests[num_decodes:]:
        whole = samples and (num_prefills == 1 or r is not requests[-1])
        chunks.append(ScheduledChunk(r, r.num_tokens - 3 - (not whole), 3, whole))
    return Step(chunks, num_decodes, []), num_blocks


def states(step: Step, **options: Any) -> list[SamplingState]:
    params = SamplingParams(temperature=0, **options)
    return [SamplingState(params, 0, vocab_size=CONFIG.vocab_size) for chunk in step.chunks if chunk.samples]


def run(model: Decoder, step: Step, cache: Any, **options: Any) -> SampleOutput:
    return ModelRunner(model, cache, CPU).run(step, states(step, **options))


@pytest.mark.parametrize(
    ("num_decodes", "num_prefills", "max_rows", "prompts", "calls"),
    [
        (3, 0, 3, False, [3]),
        (3, 0, 2, False, []),
        (0, 2, 9, False, []),
        (1, 1, 9, False, [1]),
        (3, 3, 3, False, [3]),
        (3, 3, 2, False, []),
        (3, 0, 3, True, [3]),
        (0, 2, 9, True, [5, 1]),
        (3, 3, 3, True, [3, 5, 4]),
        (1, 1, 9, True, [1, 3]),
    ],
)
def test_decodes_in_c_prefills_in_torch_or_in_c(
    num_decodes: int, num_prefills: int, max_rows: int, prompts: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they give what torch alone gives: tokens and log-probabilities in order, keys and values."""
    monkeypatch.setattr(model_runner, "PROMPT_ROWS", 5)
    model = decoder(CONFIG)
    assert model.native is not None
    step, num_blocks = make_step(num_decodes, num_prefills)
    cache = filled_cache(CONFIG, [chunk.request for chunk in step.chunks], num_blocks, BLOCK, torch.float32)
    other = copy_cache(cache, torch.float32)
    wanted = run(in_fp32(model), step, other, logprobs=2)
    watched = Watched(model.native, max_rows, prompts=prompts)
    model.native = watched  # type: ignore[assignment]
    found = run(model, step, cache, logprobs=2)
    assert watched.calls == calls
    assert found.token_ids == wanted.token_ids
    assert len(found.token_ids) == sum(chunk.samples for chunk in step.chunks) == len(found.logprobs)
    for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    new = [slot(c.request, c.start + i, BLOCK) for c in step.chunks for i in range(c.num_tokens)]
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert_near(a[new], b[new])


def test_a_prefill_that_does_not_end_its_prompt_gives_no_token() -> None:
    model = decoder(CONFIG)
    step, num_blocks = make_step(0, 2, samples=False)
    cache = filled_cache(CONFIG, [chunk.request for chunk in step.chunks], num_blocks, BLOCK, torch.float32)
    assert run(model, step, cache) == SampleOutput([], [])
    new = [slot(c.request, c.start + i, BLOCK) for c in step.chunks for i in range(c.num_tokens)]
    assert all(layer[new].isfinite().all() for layer in cache.layers)


def test_in_one_pass_decodes_are_computed_with_the_prompts() -> None:
    model = decoder(CONFIG)
    assert model.native is not None
    watched = Watched(model.native, 9)
    model.native = watched  # type: ignore[assignment]
    step, num_blocks = make_step(2, 1)
    cache = filled_cache(CONFIG, [chunk.request for chunk in step.chunks], num_blocks, BLOCK, torch.float32)
    tokens = ModelRunner(model, cache, CPU, one_pass=True).run(step, states(step)).token_ids
    assert watched.calls == []
    assert tokens == run(model, step, cache).token_ids
    assert watched.calls == [2]
    ModelRunner(model, cache, CPU, one_pass=True).run(make_step(2, 0)[0], states(make_step(2, 0)[0]))
    assert watched.calls == [2, 2]  # decodes alone keep their path


class Device:
    """A device's decoder and its prompts, that note what they are given. tokens: of the step before."""

    max_rows, block_rows, hopper = 8, 16, HopperKernels()

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.in_graph, self.passed = tokens, 0, list[int]()

    def launch(self, step: Step, states: Any, sources: Any, probe: Any, traits: Any) -> Any:
        self.in_graph = len(step.chunks)
        return traits

    def launch_mixed(self, step: Step, states: Any, sources: Any, decodes: int, others: Any) -> Any:
        self.in_graph = decodes
        return others()

    def tokens_of(self, sources: list[int]) -> torch.Tensor:
        return torch.tensor([self.tokens[place] if place >= 0 else -1 for place in sources])

    def logits(self, rows: Any, *_: Any) -> torch.Tensor:
        self.passed = rows.token_ids.tolist()
        return torch.eye(len(rows.sample_rows), CONFIG.vocab_size)

    def choose(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(logits.argmax(-1))


@pytest.mark.parametrize(("one_pass", "in_graph"), [(False, 2), (True, 0)])
def test_a_step_with_prompts_leaves_its_tokens_on_the_device(one_pass: bool, in_graph: int) -> None:
    """Two decodes, of which the device alone knows the first one's token, and a prompt."""
    device = Device([41, 42])
    step, _ = make_step(2, 1)
    pending, known = step.chunks[0].request, step.chunks[1].request
    step.chunks[0] = ScheduledChunk(pending, pending.num_tokens, 1, True)
    pending.blocks = pending.blocks * 2
    prompt = step.chunks[2]
    cache: Any = type("Cache", (), {"block_size": BLOCK})()
    prompts = GraphedPrompts(device, cache, CPU, most_graphed=0)
    runner = ModelRunner(decoder(CONFIG), cache, CPU, device, prompts, one_pass=one_pass, prompts_ahead=True)  # type: ignore[arg-type]
    assert runner.can_run_ahead(step, states(step))
    chosen = runner.launch_rows(step, states(step), [1, -1])
    assert device.in_graph == in_graph
    theirs = prompt.request.token_ids[prompt.start : prompt.start + 3]
    assert device.passed == ([42, known.token_ids[-1], *theirs] if one_pass else theirs)
    assert chosen.tolist() == list(range(3 - in_graph))  # type: ignore[attr-defined]
    assert not runner.can_run_ahead(step, states(step, logprobs=1))


def test_data_ranks_take_a_graph_if_all_of_them_do() -> None:
    """Also one that has nothing to do; not if one has too many rows, or prompts, or a probe looks at all of them."""
    device, alike = Device([]), DecodeTraits(3, 9, draws=False, filtered=False, on_host=False)
    step, _ = make_step(2, 0)
    cache: Any = type("Cache", (), {"block_size": BLOCK})()
    prompts = GraphedPrompts(device, cache, CPU, most_graphed=0)
    runner = ModelRunner(decoder(CONFIG), cache, CPU, device, prompts, prompts_ahead=False)  # type: ignore[arg-type]
    for own in (step, Step([], 0, [])):
        device.in_graph = -1
        assert runner.launch_rows(own, states(own), None, Together(3, alike)) is alike
        assert device.in_graph == len(own.chunks)
    many = replace(alike, rows=Device.max_rows + 1)
    for together in (Together(3, None), Together(many.rows, many)):
        device.in_graph = -1
        assert len(runner.launch_rows(step, states(step), None, together).wait().token_ids) == 2
        assert device.in_graph == -1
    runner.count_experts(True)
    assert runner.launch_rows(step, states(step), None, Together(3, alike)) is alike
    runner.probe, device.in_graph = Recording(), -1
    runner.launch_rows(step, states(step), None, Together(3, alike))
    assert device.in_graph == -1


@NEEDS_INTERPRETER
def test_a_form_that_failed_comes_for_the_first_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step for which memory ran out nothing was made ready that a graph would need."""

    class Failing(Device):
        def logits(self, rows: Any, *_: Any) -> torch.Tensor:
            if not self.passed:
                self.passed = [1]
                raise torch.OutOfMemoryError
            return super().logits(rows)

    device, cache = Failing([]), cast(Any, SimpleNamespace(block_size=BLOCK))
    monkeypatch.setattr(prompt_graphs, "GraphPool", RerunPool)
    prompts = GraphedPrompts(device, cache, CPU, most_graphed=64)
    with pytest.raises(torch.OutOfMemoryError):
        prompts.logits(make_step(0, 4)[0].chunks)
    for number in (2, 4, 3, 2, 4, 3, 3):
        step, _ = make_step(0, number)
        assert len(prompts.logits(step.chunks)) == step.num_samples == number - 1
        theirs = [c.request.token_ids[c.start : c.start + c.num_tokens] for c in step.chunks]
        assert device.passed[: 3 * number] == [token for own in theirs for token in own]


@NEEDS_INTERPRETER
def test_tokens_that_a_graph_chose_are_taken_where_nothing_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device, and by a host that waits for them: of a chunk that does not sample, and two that do."""

    class Choosing(Device):
        def logits(self, rows: Any, *_: Any) -> torch.Tensor:
            return 1e4 * super().logits(rows)

        def choose(self, logits: torch.Tensor, out: torch.Tensor) -> None:
            out.copy_(20 + torch.arange(len(out)))

    monkeypatch.setattr(prompt_graphs, "GraphPool", RerunPool)
    device, cache = Choosing([]), cast(Any, SimpleNamespace(block_size=BLOCK))
    step, _ = make_step(0, 3)
    step = Step(step.chunks[::-1], 0, [])  # the one that does not sample first
    greedy, drawn = states(step), SamplingState(SamplingParams(seed=0), 0)
    for ahead in (True, False):
        prompts = GraphedPrompts(device, cache, CPU, most_graphed=64)
        runner = ModelRunner(decoder(CONFIG), cache, CPU, device, prompts, prompts_ahead=ahead)  # type: ignore[arg-type]
        for asked, expected in ((greedy, [20, 21]), ([greedy[0], drawn], [0, 1]), (greedy, [20, 21])):
            found: Any = runner.launch_rows(step, asked, None)
            tokens = found.tolist() if ahead else found.wait().token_ids
            assert tokens == expected
            assert ahead or found.wait().logprobs == [None, None]


def test_torch_has_its_threads_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(CONFIG)
    step, num_blocks = make_step(2, 0)
    cache = filled_cache(CONFIG, [chunk.request for chunk in step.chunks], num_blocks, BLOCK, torch.float32)
    torch.set_num_threads(2)
    runner = ModelRunner(model, cache, CPU)
    seen: list[int] = []

    def fail(*_arguments: object, **_options: object) -> None:
        seen.append(torch.get_num_threads())
        raise MemoryError

    monkeypatch.setattr(model, "native", fail)
    monkeypatch.setattr(fail, "max_rows", 9, raising=False)
    with pytest.raises(MemoryError):
        runner.run(step, states(step))
    assert (seen, torch.get_num_threads()) == ([1], 2)


def test_small_layers_decode_many_rows_in_c_and_large_ones_few() -> None:
    assert most_rows(CONFIG, torch.bfloat16) == 64
    mixtral, olmoe = PRESETS["mixtral-8x7b"].config, PRESETS["olmoe-1b-7b"].config
    assert most_rows(mixtral, torch.bfloat16) == 4
    assert most_rows(mixtral, torch.bfloat16) <= most_rows(olmoe, torch.bfloat16) <= most_rows(olmoe, torch.float32)


def test_a_row_whose_last_token_is_pending_draws_the_number_after_it() -> None:
    state = SamplingState(SamplingParams(temperature=1.0), 3)
    known, pending = _after_pending(state, -1), _after_pending(state, 0)
    assert known is state
    assert pending.uniform() == state.uniform(1) != state.uniform()
    assert state.num_tokens == 0
