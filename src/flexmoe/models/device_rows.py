"""What a decode step on a GPU is given, and who computes it. Torch only: no Triton, which a CPU start need not import.

Enters and leaves: device tensors at fixed addresses, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.kernels.gpu import why_no_triton
from flexmoe.kernels.prefill_attention import Spans
from flexmoe.kernels.sample import SampleParams
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.hopper import HopperKernels
from flexmoe.moe.load import ExpertCounter

PDL_CAPABILITY = (9, 0)  # programmatic dependent launch: a kernel may start, and load weights, before the last ends
_HEAD_DIMS = (16, 256)
_MOST_TOP_K, _MOST_EXPERTS = 16, 1024
_MOST_TOKENS = 500_000  # of the vocabulary: sums of more weights may not fit 64 bits


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """T rows, each the latest token of a sequence; padded ones have length 0.

    token_ids: int64 [T]. sources: int32 [T]; where >= 0 the token is the one that the step before sampled in that row.
    lengths: int32 [T], keys of each row, this token included. tables: int32, the blocks of row t from
    t * table_stride; table_stride: int32 [1].
    """

    token_ids: Tensor
    sources: Tensor
    lengths: Tensor
    tables: Tensor
    table_stride: Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How each of T rows is sampled. filtered: whether any of them has a top_k or a top_p."""

    params: SampleParams
    filtered: bool


@dataclass(frozen=True, slots=True)
class PromptRows:
    """T rows. token_ids: int32 [T]. spans: which rows are whose, and so where they stand in requests and in the cache.

    sample_rows: int32 [N], the rows whose logits are wanted. sample_spans: spans, but only of the blocks that hold such
    rows. padded: whether there may be rows of padding, which are in no span.
    """

    token_ids: Tensor
    spans: Spans
    sample_rows: Tensor
    sample_spans: Spans
    padded: bool = False


class DeviceDecoder(Protocol):
    """A decoder whose steps wait for nothing.

    logits: fp32 [R, V]; sampled: int64 [R], R the most rows of a step, -1 where logits are not numbers. Both of the
    latest step.
    spread: over ranks that share the vocabulary and take the same steps; then logits are only there after one with
    `sampling`.
    kernels: what computes a step, in words.
    """

    logits: Tensor
    sampled: Tensor
    spread: bool
    kernels: str

    def step(
        self,
        rows: DeviceRows,
        sampling: Sampling | None,
        cache: KVCache,
        probe: Probe | None = None,
        *,
        long: bool = False,
    ) -> None:
        """Compute the rows, write their keys and values, sample (greedily without `sampling`). Data ranks have as many.

        long: rows look back at thousands of keys; the answer is the same, up to rounding.
        """

    def count(self, rows: int, counter: ExpertCounter) -> None:
        """Add the experts that the latest step chose to the counter's tensors. rows: of that step; padding counts not.

        Launched behind the step, not part of it: a step that is counted is the same graph.
        """


class DevicePrompts(Protocol):
    """Computes steps of many rows: prompts. block_rows: of the blocks that their `Spans` cut rows into.

    hopper: the kernels for Hopper that it uses.
    """

    block_rows: int
    hopper: HopperKernels

    def logits(
        self, rows: PromptRows, cache: KVCache, probe: Probe | None = None, most_rows: int | None = None
    ) -> Tensor:
        """Logits [N, V] of the sample rows, in the model's dtype; writes the rows' keys and values into the cache.

        probe: without one the last layer need not compute more of the other rows than keys and values; in bf16 that
        may be another rounding. most_rows: T of the data rank that has most, if there are several.
        """

    def choose(self, logits: Tensor, out: Tensor) -> None:
        """out [N] int64 = the likeliest token of each row of logits [N, V], -1 where these are not numbers."""

    def assist(self, most_rows: int | None) -> Tensor:
        """A step in which this data rank has no rows, but the others' tokens come to its experts: logits [0, V]."""


def why_not_fused(config: ModelConfig, device: torch.device, backend: str, block_size: int) -> str:
    """Why the Triton kernels cannot decode this model, or "" if they can."""
    if device.type != "cuda" or backend != "triton":
        return f"device {device.type} with expert backend {backend}"
    if block_size & (block_size - 1):
        return f"block_size {block_size} is not a power of two"
    least, most = _HEAD_DIMS
    if not least <= config.attention.head_dim <= most:
        return f"head_dim {config.attention.head_dim} is outside of {least} to {most}"
    if config.vocab_size > _MOST_TOKENS:
        return f"a vocabulary of {config.vocab_size} tokens is above {_MOST_TOKENS}"
    if config.moe is not None and config.moe.top_k > _MOST_TOP_K:
        return f"{config.moe.top_k} experts a token are more than {_MOST_TOP_K}"
    if config.moe is not None and config.moe.num_experts > _MOST_EXPERTS:
        return f"{config.moe.num_experts} experts are more than {_MOST_EXPERTS}"
    return why_no_triton(device)
