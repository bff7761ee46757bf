"""The real `openai` client, as users have it: sync and async, plain and streaming, over every endpoint it knows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from flexmoe import LLM, SamplingParams
from tests.server.serving import Running

MODEL = "builtin"
STORY = "Once upon a time there was"
QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]
ANSWER = "The capital of Norway is Oslo."


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.api, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def offline() -> Iterator[LLM]:
    with LLM(num_blocks=192, threads=1) as llm:
        yield llm


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "flexmoe"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4")


# ------------------------------------------------------------------------------------------------------- completions


def test_a_completion_is_the_engine_s(client: openai.OpenAI, offline: LLM) -> None:
    expected = offline.generate(STORY, SamplingParams(temperature=0, max_tokens=24))[0]
    found = client.completions.create(model=MODEL, prompt=STORY, temperature=0, max_tokens=24)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert found.usage.completion_tokens == 24
    assert found.usage.prompt_tokens == len(expected.prompt_token_ids)
    default = client.completions.create(model=MODEL, prompt=STORY)
    assert default.usage is not None
    assert default.usage.completion_tokens <= 16


def test_a_stream_joins_to_the_plain_answer(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": STORY, "temperature": 0, "max_tokens": 24}
    plain = client.completions.create(**options).choices[0].text
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == plain
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert len(chunks) > 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_in_batches_and_as_token_ids(client: openai.OpenAI, offline: LLM) -> None:
    texts = [STORY, "The old king"]
    ids = [offline.encode(text) for text in texts]
    options: Any = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt=texts, **options)
    by_ids = client.completions.create(prompt=ids, **options)
    single = client.completions.create(prompt=ids[1], **options)
    assert [choice.index for choice in by_text.choices] == [0, 1]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert single.choices[0].text == by_ids.choices[1].text
    echoed = client.completions.create(prompt=ids, echo=True, **options)
    for text, plain, echo in zip(texts, by_ids.choices, echoed.choices, strict=True):
        assert echo.text == text + plain.text


def test_several_samples_and_the_best_of_them(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": [STORY, "The"], "max_tokens": 6, "seed": 5, "logprobs": 0}
    three = client.completions.create(n=3, **options)
    assert [choice.index for choice in three.choices] == list(range(6))
    assert len({choice.text for choice in three.choices[:3]}) > 1
    best = client.completions.create(n=1, best_of=3, **options)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    assert best.choices[0].text == max(three.choices[:3], key=mean).text
    assert best.usage is not None
    assert best.usage.completion_tokens == 36
    streamed: dict[int, str] = {}
    for chunk in client.completions.create(n=3, stream=True, **options):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(6)] == [choice.text for choice in three.choices]


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": STORY, "max_tokens": 6, "temperature": 0, "logprobs": 2, "echo": False}
    found = client.completions.create(**options).choices[0]
    assert found.logprobs is not None
    assert "".join(found.logprobs.tokens or ()) == found.text
    assert found.logprobs.top_logprobs is not None
    assert found.logprobs.token_logprobs is not None
    for token, own, top in zip(
        found.logprobs.tokens or (), found.logprobs.token_logprobs, found.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == own == max(top.values())
    for token, offset in zip(found.logprobs.tokens or (), found.logprobs.text_offset or (), strict=True):
        assert found.text[offset:].startswith(token)
    entries = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **options)]
    assert [token for entry in entries if entry for token in entry.tokens or ()] == found.logprobs.tokens
    assert [o for entry in entries if entry for o in entry.text_offset or ()] == found.logprobs.text_offset


def test_the_options_of_sampling_take_effect(client: openai.OpenAI, offline: LLM) -> None:
    def text(**options: Any) -> str:
        return client.completions.create(model=MODEL, prompt=STORY, max_tokens=20, **options).choices[0].text

    greedy = text(temperature=0)
    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text(extra_body={"top_k": 1}) == text(extra_body={"min_p": 1.0}) == text(top_p=1e-9) == greedy
    first = offline.encode(STORY + greedy)[len(offline.encode(STORY))]
    assert not text(temperature=0, logit_bias={str(first): -100}).startswith(greedy[:4])
    assert text(temperature=0, frequency_penalty=2, presence_penalty=2) != greedy
    assert text(temperature=0, extra_body={"repetition_penalty": 1.5}) != greedy
    stop = greedy.split()[2]
    cut = client.completions.create(model=MODEL, prompt=STORY, max_tokens=20, temperature=0, stop=[stop, "never"])
    assert cut.choices[0].text == greedy[: greedy.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


# -------------------------------------------------------------------------------------------------- chat completions


def test_chat(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    plain = client.chat.completions.create(**options)
    assert plain.choices[0].message.content == ANSWER
    assert plain.choices[0].message.role == "assistant"
    assert plain.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        cut = client.chat.completions.create(**options, **limit)
        assert cut.usage is not None
        assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")


def test_chat_with_parts_history_and_what_a_client_sends_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0).choices[0].message
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "?"}]},
        first.model_dump(),
        {"role": "user", "content": "And of Peru?", "name": "ann"},
    ]
    found = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)
    assert found.choices[0].message.content
    messages[1]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(openai.BadRequestError, match="text parts only"):
        client.chat.completions.create(model=MODEL, messages=messages)


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    plain = client.chat.completions.create(**options).choices[0].logprobs
    assert plain is not None
    assert plain.content is not None
    assert b"".join(bytes(e.bytes or ()) for e in plain.content[:-1]).decode() == ANSWER
    assert all(len(entry.top_logprobs) == 3 for entry in plain.content)
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in plain.content)
    chunks = client.chat.completions.create(stream=True, **options)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
    assert [entry.token for entry in streamed] == [entry.token for entry in plain.content]


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Lima"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


def test_answers_bound_to_json(client: openai.OpenAI) -> None:
    bound: Any = {"type": "json_schema", "json_schema": {"name": "town", "schema": SCHEMA, "strict": True}}
    options: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 200}
    found = client.chat.completions.create(**options, n=2, seed=1, response_format=bound)
    for choice in found.choices:
        assert json.loads(choice.message.content or "")["city"] in ("Oslo", "Lima")
    any_object = client.chat.completions.create(**options, temperature=0, response_format={"type": "json_object"})
    assert (any_object.choices[0].message.content or "").startswith("{")
    parsed = client.responses.create(
        model=MODEL, input="A town?", text={"format": {"type": "json_schema", "name": "town", "schema": SCHEMA}}
    )
    assert json.loads(parsed.output_text).keys() == {"city", "big"}
    bound["json_schema"]["schema"] = {"type": "colour"}
    with pytest.raises(openai.BadRequestError, match="the JSON schema is refused"):
        client.chat.completions.create(**options, response_format=bound)


# --------------------------------------------------------------------------------------------------------- responses


def test_responses(client: openai.OpenAI) -> None:
    plain = client.responses.create(model=MODEL, input=QUESTION[0]["content"], temperature=0)
    assert plain.output_text == ANSWER
    assert plain.status == "completed"
    assert plain.usage is not None
    assert plain.usage.total_tokens == plain.usage.input_tokens + plain.usage.output_tokens
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION[0]["content"]}]}]
    cut = client.responses.create(model=MODEL, input=items, temperature=0, max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model=MODEL, input=QUESTION[0]["content"], temperature=0) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == ANSWER
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") > 3


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    for options in ({"store": True}, {"previous_response_id": "resp-1"}, {"background": True}):
        with pytest.raises(openai.BadRequestError, match="not supported by this server") as refusal:
            client.responses.create(model=MODEL, input="x", **options)  # type: ignore[call-overload]
        assert refusal.value.param == next(iter(options))
        assert refusal.value.code == "unsupported_parameter"


# ------------------------------------------------------------------------------------------------------------- async


def test_the_async_client(server: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=server.api, api_key="any", max_retries=0) as client:
            options: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0}
            answers = await asyncio.gather(*(client.chat.completions.create(**options) for _ in range(12)))
            assert {answer.choices[0].message.content for answer in answers} == {ANSWER}
            text = ""
            async for chunk in await client.chat.completions.create(stream=True, **options):
                text += chunk.choices[0].delta.content or ""
            assert text == ANSWER
            stream = await client.completions.create(model=MODEL, prompt=STORY, max_tokens=5, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream])
            assert (await client.responses.create(model=MODEL, input="Hello")).output_text
            async with client.responses.stream(model=MODEL, input="Hello", temperature=0) as events:
                assert [event.type async for event in events][-1] == "response.completed"
            assert [model.id async for model in client.models.list()] == [MODEL]

    with ThreadPoolExecutor(1) as thread:  # in this one the browser of other tests may have an event loop
        thread.submit(lambda: asyncio.run(run())).result()


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"temprature": 1})
