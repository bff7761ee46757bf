"""Every element is read, once, whatever the sizes: the sum is right."""

from __future__ import annotations

import pytest
import torch

from flexmoe.kernels.triton.stream_read import StreamReadTile, stream_read
from tests.kernels.support import normal, poisoned


# The interpreter makes loop bounds of one-element arrays.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
@pytest.mark.parametrize("count", [1, 127, 128, 1000, 4096])
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_sum(count: int, programs: int) -> None:
    x, out = normal(count), poisoned(programs)
    stream_read(x, out, tile=StreamReadTile(block=128, num_warps=4))
    torch.testing.assert_close(out.sum(), x.sum(), rtol=1e-4, atol=1e-4)
