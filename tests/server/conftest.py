"""One server for most tests, which each of them must leave idle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("fastapi") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.server.serving import Running, running

    @pytest.fixture(scope="session")
    def shared_server() -> Iterator[Running]:
        with running() as server:
            yield server

    @pytest.fixture
    def server(shared_server: Running) -> Iterator[Running]:
        yield shared_server
        shared_server.assert_idle()
