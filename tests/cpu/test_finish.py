"""How requests end and what they report: stop tokens, stop strings, lengths, samples and log-probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from flexmoe import LLM, CompletionOutput, RequestError, SamplingParams
from tests.cpu.serving import WAYS, assert_idle, open_llm, tokens
from tests.cpu.tiny_models import CASES, build

PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
EOS = 2  # of the built-in model


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM(dtype="float32", threads=1, kv_cache_memory=2**26) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


@pytest.fixture(scope="module")
def story(shared: LLM) -> CompletionOutput:
    """What the model says when nothing stops it."""
    return shared.generate(PROMPT, GREEDY)[0].outputs[0]


def complete(llm: LLM, **changes: Any) -> CompletionOutput:
    return llm.generate(PROMPT, replace(GREEDY, **changes))[0].outputs[0]


def soon_eos(after: int) -> dict[str, Any]:
    """Parameters under which the end-of-sequence token is the first choice, but not before so many tokens."""
    return {"logit_bias": {EOS: 1e6}, "min_tokens": after, "ignore_eos": False}


# ----------------------------------------------------------------------------------------------------------- tokens


def test_length(llm: LLM) -> None:
    sample = complete(llm, max_tokens=5)
    assert (sample.finish_reason, sample.stop_reason, len(sample.token_ids)) == ("length", None, 5)
    assert len(complete(llm, max_tokens=1).token_ids) == 1


def test_the_end_of_sequence_token_is_no_text(llm: LLM, story: CompletionOutput) -> None:
    sample = complete(llm, **soon_eos(6))
    assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
    assert sample.token_ids == (*story.token_ids[:6], EOS)
    assert sample.text == complete(llm, max_tokens=6).text
    assert complete(llm, **soon_eos(0)).text == ""


def test_min_tokens_counts_the_end_of_sequence_token_itself(llm: LLM) -> None:
    """A token is forbidden while fewer than min_tokens came before it."""
    for least in (0, 1, 4):
        assert len(complete(llm, **soon_eos(least)).token_ids) == least + 1


def test_ignore_eos(llm: LLM) -> None:
    sample = complete(llm, logit_bias={EOS: 1e6}, ignore_eos=True, max_tokens=7, skip_special_tokens=False)
    assert (sample.finish_reason, sample.token_ids) == ("length", (EOS,) * 7)
    assert sample.text == str(llm.tokenizer.token(EOS)) * 7


def test_stop_token_ids(llm: LLM, story: CompletionOutput) -> None:
    stop = list(dict.fromkeys(story.token_ids))[3]  # the fourth token that had not come before
    place = story.token_ids.index(stop)
    sample = complete(llm, stop_token_ids=[stop, 77])
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert sample.token_ids == story.token_ids[: place + 1]
    assert sample.text == complete(llm, max_tokens=place).text
    assert complete(llm, stop_token_ids=stop).token_ids == sample.token_ids


def test_the_stop_token_that_is_also_the_end_of_sequence_token(llm: LLM) -> None:
    sample = complete(llm, **soon_eos(2), stop_token_ids=[EOS])
    assert (sample.finish_reason, len(sample.token_ids)) == ("stop", 3)
    sample = complete(llm, stop_token_ids=[EOS], logit_bias={EOS: 1e6})  # with ignore_eos
    assert (sample.finish_reason, sample.stop_reason, len(sample.token_ids)) == ("stop", EOS, 1)


@pytest.mark.parametrize("prompt_length", [8, 15])
def test_the_context_is_full(prompt_length: int) -> None:
    with open_llm("llama-dynamic") as llm:  # 16 positions
        (output,) = llm.generate([[5] * prompt_length], SamplingParams(max_tokens=None, ignore_eos=True))
        assert output.outputs[0].finish_reason == "length"
        assert len(output.token_ids) == 16 - prompt_length
        with pytest.raises(RequestError, match="has 16 tokens, but the context of max_model_len=16 must also hold at"):
            llm.generate([[5] * 16])
        assert_idle(llm)


def test_the_cache_is_full() -> None:
    with open_llm(num_blocks=2) as llm:  # of 16 tokens; the model's context has 128
        assert llm.engine.max_model_len == llm.describe()["max_model_len"] == 32
        (output,) = llm.generate([[5] * 30], SamplingParams(max_tokens=9, ignore_eos=True))
        assert (output.outputs[0].finish_reason, len(output.token_ids)) == ("length", 2)
        with pytest.raises(RequestError, match=r"the KV cache of 32 tokens must also hold .* raise kv_cache_memory"):
            llm.generate([[5] * 32])
        assert_idle(llm)


# ---------------------------------------------------------------------------------------------------------- strings


def borders(llm: LLM, story: CompletionOutput) -> list[int]:
    """Where each token's text ends in the story."""
    return [len(llm.tokenizer.decode(story.token_ids[: count + 1])) for count in range(len(story.token_ids))]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_across_tokens(llm: LLM, story: CompletionOutput, streamed: bool) -> None:
    """Two characters before and after each border in turn; no part of it is ever shown."""
    ends = borders(llm, story)
    for border in ends[2:8]:
        stop = story.text[border - 2 : border + 2]
        expected = story.text[: story.text.index(stop)]
        params = replace(GREEDY, stop=stop)
        outputs = list(llm.stream(PROMPT, params)) if streamed else llm.generate(PROMPT, params)
        assert all(expected.startswith(output.text) for output in outputs)
        sample = outputs[-1].outputs[0]
        assert (sample.text, sample.finish_reason, sample.stop_reason) == (expected, "stop", stop)
        wanted = next(i for i, end in enumerate(ends) if end >= len(expected) + len(stop))
        assert len(sample.token_ids) == wanted + 1


def test_a_stop_string_may_be_kept(llm: LLM, story: CompletionOutput) -> None:
    stop = story.text[10:14]
    sample = complete(llm, stop=[stop], include_stop_str_in_output=True)
    assert sample.text == story.text[: story.text.index(stop) + len(stop)]


def test_the_first_of_several_stop_strings(llm: LLM, story: CompletionOutput) -> None:
    early, late = story.text[8:12], story.text[30:36]
    assert complete(llm, stop=[late, early]).stop_reason == early
    assert complete(llm, stop=["never said", late]).stop_reason == late


def test_a_text_held_back_is_released_at_the_end(llm: LLM, story: CompletionOutput) -> None:
    """The last characters could have begun a stop string; the request ended first."""
    cut = complete(llm, max_tokens=8).text
    sample = complete(llm, max_tokens=8, stop=cut[-3:] + "\0")
    assert (sample.text, sample.finish_reason) == (cut, "length")


def test_a_stop_string_with_the_last_token(llm: LLM, story: CompletionOutput) -> None:
    """Both apply in one step: the stop string is the reason."""
    stop = complete(llm, max_tokens=8).text[-3:]
    sample = complete(llm, max_tokens=8, stop=stop)
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)


def test_no_stop_string_before_min_tokens(llm: LLM, story: CompletionOutput) -> None:
    space = complete(llm, stop=" ", min_tokens=10)
    assert len(space.token_ids) >= 10
    assert len(complete(llm, stop=" ").token_ids) < 10


# ---------------------------------------------------------------------------------------------------------- samples


def test_samples_are_distinct_and_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=5, max_tokens=12)
    (output,) = llm.generate(PROMPT, params)
    assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({sample.token_ids for sample in output.outputs}) == 4
    assert output.text == output.outputs[0].text
    assert tokens(llm.generate(PROMPT, params)) == tokens([output])
    assert tokens(llm.generate(PROMPT, replace(params, n=1))) == tokens([output])[:1]
    assert tokens(llm.generate(PROMPT, replace(params, seed=6))) != tokens([output])


def test_samples_of_requests_without_seeds_are_all_distinct(llm: LLM) -> None:
    outputs = llm.generate([PROMPT] * 3, SamplingParams(n=3, max_tokens=12))
    assert len(set(tokens(outputs))) == 9


def test_the_engine_s_seed_makes_a_run_repeatable() -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        with open_llm(seed=seed) as llm:
            return tokens(llm.generate([[5, 6], [5, 6]], SamplingParams(n=2, max_tokens=8)))

    assert run(1) == run(1) != run(2)


def test_samples_may_end_apart(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=5, max_tokens=40, stop=".", top_p=0.9)
    (output,) = llm.generate(PROMPT, params)
    lengths = [len(sample.token_ids) for sample in output.outputs]
    assert len(set(lengths)) > 1
    assert output.finished
    *_, streamed = llm.stream(PROMPT, params)
    assert [s.text for s in streamed.outputs] == [s.text for s in output.outputs]
    assert [s.finish_reason for s in streamed.outputs] == [s.finish_reason for s in output.outputs]


# --------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_logprobs_are_those_of_transformers(way: str) -> None:
    """Of the raw model, whatever temperature and penalties did to the choice."""
    prompt = [5, 9, 14, 30, 7]
    params = [
        SamplingParams(temperature=0, max_tokens=6, logprobs=3, ignore_eos=True),
        SamplingParams(temperature=2.0, seed=1, max_tokens=6, logprobs=0, ignore_eos=True, presence_penalty=2.0),
    ]
    with open_llm(way=way) as llm:
        outputs = llm.generate([prompt, prompt], params)
    for output, count in zip(outputs, (3, 0), strict=True):
        ids = [*prompt, *output.token_ids]
        expected = build(CASES["mixtral"])(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        assert [entry.token_id for entry in logprobs] == list(output.token_ids)
        for row, entry in zip(expected, logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            best = row.topk(count)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(entry.rank == 1 for entry in outputs[0].outputs[0].logprobs or ())
    assert any(entry.rank > 1 for entry in outputs[1].outputs[0].logprobs or ())


def test_no_logprobs_unless_asked_for(llm: LLM) -> None:
    with_and_without = [replace(GREEDY, max_tokens=3, logprobs=count) for count in (None, 1)]
    found = [output.outputs[0].logprobs for output in llm.generate([PROMPT] * 2, with_and_without)]
    assert found[0] is None
    assert len(found[1] or ()) == 3


def test_logprobs_grow_with_the_stream(llm: LLM) -> None:
    outputs = [output.outputs[0] for output in llm.stream(PROMPT, replace(GREEDY, max_tokens=5, logprobs=1))]
    assert [len(sample.logprobs or ()) for sample in outputs] == [1, 2, 3, 4, 5]
    for before, after in itertools.pairwise(outputs):
        assert (after.logprobs or ())[:-1] == before.logprobs
