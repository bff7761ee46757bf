"""The pools, and one thread for torch in the tests' own process too: there are more ranks than cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import hasten
from tests.multi.pool import Pool

hasten()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    """By number of ranks."""
    made = {size: Pool(size) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
