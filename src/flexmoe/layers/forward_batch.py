"""ForwardBatch: everything one forward pass needs beside weights and cache. The runner builds it and passes it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan


class Probe(Protocol):
    """Sees the tensors of a pass by name (`flexmoe trace`, `flexmoe verify`). layer is -1 outside of the layers."""

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Called after the stage computed `tensor`; must not change it."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T rows, decodes first (one row each), then the prefill spans. On an idle data rank T is 0.

    token_ids, positions, slot_mapping: [T]; slot_mapping says where each row's key and value go in the cache.
    attention: for each window size in the model (None: unlimited), the groups of rows and the keys they see.
    sample_rows: [N] rows whose logits are wanted; None means all T.
    most_rows: rows of the data rank that has most in this step; None: they are not told, and there is but one.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    attention: Mapping[int | None, Sequence[DecodeGroup | PrefillSpan]]
    sample_rows: Tensor | None = None
    probe: Probe | None = None
    most_rows: int | None = None
