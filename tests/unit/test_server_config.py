"""The options of the server, checked where they are made."""

from __future__ import annotations

from typing import Any

import pytest

from flexmoe.config.server import ServerConfig
from flexmoe.errors import ConfigError


def test_what_is_not_given_is_safe() -> None:
    config = ServerConfig()
    assert config.host == "127.0.0.1"
    assert config.cors_origins == config.api_keys == ()
    assert not config.log_prompts


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"api_keys": ("good", "")}, "an API key is empty"),
        ({"api_keys": (" padded",)}, "white space"),
        ({"api_keys": ("schlüssel",)}, "not ASCII"),
        ({"port": 70000}, "port=70000"),
        ({"port": -1}, "port=-1"),
        ({"max_body_bytes": 0}, "max_body_bytes=0"),
        ({"max_n": 0}, "max_n=0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        ({"max_waiting": -1}, "max_waiting=-1"),
        ({"drain_seconds": -0.5}, "drain_seconds=-0.5"),
        ({"drain_seconds": float("nan")}, "drain_seconds=nan"),
        ({"step_seconds": -1.0}, "step_seconds=-1.0"),
        ({"receive_seconds": 0.0}, "receive_seconds=0.0"),
        ({"max_chunk_rate": 0.0}, "max_chunk_rate=0.0"),
        ({"expert_interval": -1.0}, "expert_interval=-1.0"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as refusal:
        ServerConfig(**options)
    assert "\n" not in str(refusal.value)
    assert all(key not in str(refusal.value) for key in options.get("api_keys", ()) if key)
