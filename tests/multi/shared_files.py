"""Memory of several processes of one machine in files that all map, in the place of GPUs that read each other's.

So the kernels that read it run in Triton's interpreter, each rank waiting for the others in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from flexmoe.models import fused_data_ranks, fused_ranks
from flexmoe.parallel.comm import Group
from flexmoe.parallel.peers import Shared

_FLAG_BYTES = 4


@contextmanager
def shared_files(folder: Path) -> Iterator[None]:
    """Within, ranks share memory in files of this folder, which is new and the same for all of them."""
    numbers, kept = itertools.count(), []

    def share(group: Group, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Shared:
        number, data = next(numbers), -(-rows * width * dtype.itemsize // 16) * 16
        size = data + group.size * rows * _FLAG_BYTES
        paths = [folder / f"{number}-{rank}" for rank in range(group.size)]
        paths[group.index].write_bytes(bytes(size))
        group.minimum(0, device)
        memory = [torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) for path in paths]
        kept.append(memory)
        bases = torch.tensor([each.data_ptr() for each in memory])
        own = memory[group.index][: rows * width * dtype.itemsize].view(dtype).view(rows, width)
        return Shared(own, bases, bases + data)

    with (
        patch.object(fused_ranks, "share", share),
        patch.object(fused_ranks, "why_not_shared", lambda *_, **__: ""),
        patch.object(fused_data_ranks, "why_not_shared", lambda *_, **__: ""),
    ):
        yield
