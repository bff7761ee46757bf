"""Answers that a JSON schema binds: they are JSON of that schema, in every way of computing, beside free ones."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from flexmoe import LLM, RequestError, SamplingParams
from flexmoe.engine.sampling_state import SamplingState
from tests.cpu.serving import GREEDY, assert_idle

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Oslo", "Rome"]}, "big": {"type": "boolean"}, "size": {"enum": [1, 22, 333]}},
    "required": ["name", "big"],
    "additionalProperties": False,
}
BOUND = SamplingParams(temperature=1.0, seed=3, max_tokens=200, json_schema=SCHEMA)


def test_answers_keep_to_the_schema_and_free_ones_are_as_without() -> None:
    with LLM(num_blocks=128) as llm:
        prompts = ["The capital is", "A town:"]
        alone = llm.generate(prompts[0], replace(GREEDY, max_tokens=40))[0]
        outputs = llm.generate(
            [*prompts, prompts[0]],
            [replace(BOUND, n=3), replace(BOUND, temperature=0.0), replace(GREEDY, max_tokens=40)],
        )
        for output in outputs[:2]:
            for sample in output.outputs:
                assert sample.finish_reason == "stop"
                answer = json.loads(sample.text)
                assert answer["name"] in ("Oslo", "Rome")
                assert isinstance(answer["big"], bool)
                assert answer.keys() <= {"name", "big", "size"}
        assert outputs[2].text == alone.text
        assert_idle(llm)


def test_what_is_no_schema_is_refused_and_nothing_is_left() -> None:
    with LLM(num_blocks=64) as llm:
        for schema, complaint in (({"type": "colour"}, "colour"), ({"$ref": "#/nowhere"}, "refused")):
            with pytest.raises(RequestError, match=complaint):
                llm.generate("x", replace(BOUND, json_schema=schema))
        assert_idle(llm)
    with pytest.raises(RequestError, match="leave out min_tokens and ignore_eos"):
        SamplingParams(json_schema={}, min_tokens=3)


def test_a_state_sent_elsewhere_takes_its_mask_along() -> None:
    with LLM(num_blocks=64) as llm:
        grammars = llm.engine.admission.grammars
        assert grammars is not None
        state = SamplingState(BOUND, 0, grammar=grammars.matcher(SCHEMA))
        for token in (None, llm.encode("{")[-1]):
            if token is not None:
                state.accept(token)
            sent = pickle.loads(pickle.dumps(state))
            assert np.array_equal(sent.allowed, state.allowed)
            assert not sent.device_ready
