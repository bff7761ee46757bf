"""Schemathesis: requests made from the OpenAPI page, sound and broken. No 5xx, no hang, no answer the page denies."""

from __future__ import annotations

import importlib.util

import pytest
from hypothesis import HealthCheck, given, settings

from tests.server.serving import PATIENCE, Running

if importlib.util.find_spec("schemathesis") is None:
    pytest.skip("needs schemathesis", allow_module_level=True)

import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


LIMITS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/generate/": "max_new_tokens",
}
EXAMPLES = 12  # of each operation and kind


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_as_the_page_says(server: Running, mode: GenerationMode) -> None:
    """mode: requests that keep to the page, or that break it somewhere."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 17
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # there is nothing to break

        @settings(max_examples=EXAMPLES, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            _shorten(case)
            case.call_and_validate(checks=CHECKS, timeout=PATIENCE)

        check()


def _shorten(case: schemathesis.Case) -> None:
    """Answers of a few tokens, and live figures that come to an end."""
    if case.path == "/v1/flexmoe/events":
        case.query = {**(case.query or {}), "count": 1}
    limit = LIMITS.get(case.path)
    if limit is not None and isinstance(case.body, dict):
        case.body = {**case.body, limit: 3}
        case.body.pop("max_completion_tokens", None)
