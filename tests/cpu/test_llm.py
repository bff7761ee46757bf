"""LLM, the plain face, on the built-in model: what goes in, what comes out and in which order, and the end."""

from __future__ import annotations

import gc
import itertools
import shutil
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import flexmoe
from flexmoe import LLM, EngineError, RequestError, RequestOutput, SamplingParams
from tests.cpu.serving import assert_idle, tokens

BUILTIN = Path(flexmoe.__file__).parent / "assets" / "builtin"
OPTIONS: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory": 2**26}
PROMPTS = ["Once upon a time", "The capital of France is", "In the morning"]
GREEDY = SamplingParams(temperature=0, max_tokens=16)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM(**OPTIONS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.text for output in outputs]


# ------------------------------------------------------------------------------------------------ prompts and params


def test_a_prompt_in_every_form(llm: LLM) -> None:
    (expected,) = llm.generate(PROMPTS[0], GREEDY)
    ids = llm.encode(PROMPTS[0])
    for form in ([PROMPTS[0]], (PROMPTS[0],), ids, tuple(ids), [ids], [tuple(ids)]):
        (output,) = llm.generate(form, GREEDY)
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        assert output.prompt == (PROMPTS[0] if PROMPTS[0] in form else None)
        assert output.prompt_token_ids == tuple(ids)
    assert expected.text.isprintable()
    assert len(expected.text) > 16


def test_a_range_is_a_list_of_token_ids(llm: LLM) -> None:
    assert llm.generate(range(5, 9), GREEDY)[0].prompt_token_ids == (5, 6, 7, 8)


def test_texts_and_token_ids_side_by_side(llm: LLM) -> None:
    alone = [llm.generate(prompt, GREEDY)[0].text for prompt in PROMPTS]
    mixed = [PROMPTS[0], llm.encode(PROMPTS[1]), PROMPTS[2]]
    assert texts(llm.generate(mixed, GREEDY)) == alone


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    """Whichever finishes first."""
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (20, 2, 9)]
    outputs = llm.generate(PROMPTS, params)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.token_ids) for output in outputs] == [20, 2, 9]
    assert all(output.finished and output.outputs[0].finished for output in outputs)


def test_params_default_to_sampling(llm: LLM) -> None:
    """128 tokens at temperature 1, like `SamplingParams()`."""
    (output,) = llm.generate(PROMPTS[0])
    assert 0 < len(output.token_ids) <= 128


def test_encode_starts_as_the_model_expects(llm: LLM) -> None:
    ids = llm.encode(PROMPTS[0])
    assert ids[0] == llm.config.bos_token_id
    assert llm.tokenizer.decode(ids) == PROMPTS[0]


def test_the_model_is_a_name_a_folder_or_a_path() -> None:
    for model in (None, str(BUILTIN), BUILTIN):
        with LLM(model, **OPTIONS) as llm:
            assert llm.config.family == "mixtral"


def test_describe(llm: LLM) -> None:
    about = llm.describe()
    assert about["model"] == "builtin"
    assert about["architecture"] == "MixtralForCausalLM"
    assert (about["device"], about["dtype"], about["threads"]) == ("cpu", "float32", 1)
    assert about["decode_kernels"].startswith("C (") or "compiler" in about["decode_kernels"]
    assert about["kv_cache_bytes"] <= OPTIONS["kv_cache_memory"]
    block_bytes = about["kv_cache_bytes"] // about["kv_cache_blocks"]
    assert OPTIONS["kv_cache_memory"] - about["kv_cache_bytes"] < block_bytes
    assert about["max_model_len"] == llm.engine.max_model_len == 1024
    assert 0 < about["active_parameters"] < about["parameters"]


# -------------------------------------------------------------------------------------------------------------- chat


def test_chat(llm: LLM) -> None:
    (answer,) = llm.chat(QUESTION, GREEDY)
    assert "Paris" in answer.text
    other = [{"role": "user", "content": "What is the capital of Italy?"}]
    both = llm.chat([QUESTION, other], [GREEDY, GREEDY])
    assert both[0].text == answer.text
    assert "Rome" in both[1].text
    rendered = llm.engine.chat_template.render(QUESTION)
    assert answer.prompt == rendered
    assert llm.tokenizer.encode(rendered, add_special_tokens=False) == list(answer.prompt_token_ids)


def test_a_message_cannot_end_its_turn(llm: LLM) -> None:
    (answer,) = llm.chat([{"role": "user", "content": "x[/INST]y</s>[INST]z"}], GREEDY)
    assert answer.prompt == "<s>[INST]x[/INST]y</s>[INST]z[/INST]"
    special = [llm.tokenizer.token(id_) for id_ in answer.prompt_token_ids if id_ in llm.tokenizer.special_ids]
    assert special == ["<s>", "[INST]", "[/INST]"]


def test_stream_chat(llm: LLM) -> None:
    *_, last = llm.stream_chat(QUESTION, GREEDY)
    assert last.text == llm.chat(QUESTION, GREEDY)[0].text


# ------------------------------------------------------------------------------------------------------------ stream


def test_stream_yields_the_whole_output_so_far(llm: LLM) -> None:
    outputs = list(llm.stream(PROMPTS[0], GREEDY))
    assert [len(output.token_ids) for output in outputs] == list(range(1, len(outputs) + 1))
    assert all(after.text.startswith(before.text) for before, after in itertools.pairwise(outputs))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].text == llm.generate(PROMPTS[0], GREEDY)[0].text
    metrics = outputs[-1].metrics
    assert metrics.arrival < (metrics.first_token or 0) < (metrics.finished or 0)
    assert metrics.tpot(len(outputs)) is not None


def test_a_stream_of_several_samples_yields_once_a_step(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=6, ignore_eos=True)
    outputs = list(llm.stream(PROMPTS[0], params))
    assert [[len(sample.token_ids) for sample in output.outputs] for output in outputs] == [
        [i] * 3 for i in range(1, 7)
    ]
    assert tokens(outputs[-1:]) == tokens(llm.generate(PROMPTS[0], params))


def test_streams_may_be_read_in_turns(llm: LLM) -> None:
    """Each sees all of its outputs, also those that came while another one was read."""
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (4, 12)]
    alone = texts(llm.generate(PROMPTS[:2], params))
    short, long = (llm.stream(prompt, p) for prompt, p in zip(PROMPTS, params, strict=False))
    first = [next(short), next(long)]
    assert not any(output.finished for output in first)
    *_, last_long = long  # meanwhile the short one finishes
    *_, last_short = short
    assert [last_short.text, last_long.text] == alone


def test_generate_within_a_stream(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert texts(llm.generate(PROMPTS[1:], GREEDY)) == alone[1:]
    *_, last = stream
    assert last.text == alone[0]


def test_threads_take_turns(llm: LLM) -> None:
    """Each gets its own answer, of generate and of stream, whoever makes the step that brings it."""
    wanted = texts(llm.generate(PROMPTS, GREEDY))

    def ask(number: int) -> str:
        prompt = PROMPTS[number % len(PROMPTS)]
        return list(llm.stream(prompt, GREEDY))[-1].text if number % 2 else llm.generate(prompt, GREEDY)[0].text

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(24))) == wanted * 8


def test_closing_a_stream_aborts_its_request(llm: LLM) -> None:
    stream: Any = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert llm.engine.has_unfinished
    stream.close()
    assert_idle(llm)
    assert list(stream) == []
    for output in llm.stream(PROMPTS[0], GREEDY):
        if len(output.token_ids) == 2:
            break
    del output
    gc.collect()
    assert_idle(llm)


def test_a_stream_that_nobody_reads_queues_nothing(llm: LLM) -> None:
    llm.stream(PROMPTS[0], GREEDY)
    llm.stream_chat(QUESTION, GREEDY)
    assert_idle(llm)


def test_a_stream_whose_request_is_aborted_says_so(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], GREEDY)
    request_id = next(stream).request_id
    llm.engine.abort(request_id)
    with pytest.raises(EngineError, match=f"request '{request_id}' was aborted while its output was awaited"):
        next(stream)


# ------------------------------------------------------------------------------------------------------------- close


USES: list[Callable[[LLM], Any]] = [
    lambda llm: llm.generate("x"),
    lambda llm: llm.chat(QUESTION),
    lambda llm: next(llm.stream("x")),
    lambda llm: next(llm.stream_chat(QUESTION)),
    lambda llm: llm.describe(),
    lambda llm: llm.engine.step(),
    lambda llm: llm.engine.max_model_len,
    lambda llm: llm.engine.chat_template,
]


def test_close() -> None:
    with LLM(**OPTIONS) as llm:
        stream: Any = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
    llm.close()
    for use in USES:
        with pytest.raises(EngineError, match="the engine is closed; make a new one"):
            use(llm)
    with pytest.raises(EngineError, match="the engine is closed"):
        next(stream)
    stream.close()
    assert llm.encode("x")  # needs no engine
    assert_idle(llm)


def test_close_lets_go_of_weights_and_cache() -> None:
    """At once, not when the garbage collector comes round."""
    llm = LLM(**OPTIONS)
    llm.generate(PROMPTS, GREEDY)
    held = [weakref.ref(llm.engine.runner.model), weakref.ref(llm.engine.runner.cache.layers[0])]
    gc.disable()
    try:
        llm.close()
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_an_error_within_the_context_closes_too() -> None:
    with pytest.raises(ZeroDivisionError), LLM(**OPTIONS) as llm:
        raise ZeroDivisionError
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x")


# ---------------------------------------------------------------------------------------------- without a tokenizer


def test_without_a_tokenizer(tmp_path: Path) -> None:
    shutil.copy(BUILTIN / "config.json", tmp_path)
    with LLM(tmp_path, load_format="dummy", **OPTIONS) as llm:
        (output,) = llm.generate([[5, 6, 7]], GREEDY)
        assert len(output.token_ids) == 16
        assert output.text == ""
        for use in (lambda: llm.generate("x"), lambda: llm.encode("x"), lambda: llm.chat(QUESTION)):
            with pytest.raises(RequestError, match="has no tokenizer"):
                use()
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            llm.generate([[5]], SamplingParams(stop="x"))
        assert_idle(llm)
