"""Request: one prompt on its way to its answer.

Enters: prompt token ids, sampling parameters, limits. Leaves: output token ids, and why they ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Literal

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestStatus(Enum):
    """WAITING holds no blocks; RUNNING holds blocks for all its tokens; FINISHED holds none again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sequence of tokens: prompt and output together, and how much of it the KV cache holds.

    token_ids: prompt, then output. num_prompt_tokens: how many of them are prompt.
    token_limit: tokens in all (prompt and output) at which the request ends with "length".
    num_computed_tokens: leading tokens whose keys and values are in the cache.
    num_cached_tokens: prompt tokens found in the prefix cache when the request was first admitted.
    blocks: physical block of every block_size tokens; contiguous: they are b, b+1, b+2 ...
    finish_reason: None until finished. stop_reason: the stop token id or stop string; None for eos.
    num_preemptions: how often its blocks were taken away.
    arrival: its place in the queue, set by the scheduler.
    watched: somebody reads its tokens as they come, so that gaps between them matter.
    """

    __slots__ = (
        "_min_total",
        "_stop_ids",
        "arrival",
        "blocks",
        "contiguous",
        "eos_token_ids",
        "finish_reason",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "request_id",
        "sampling",
        "status",
        "stop_reason",
        "token_ids",
        "token_limit",
        "watched",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: tuple[int, ...],
        max_total_tokens: int,
    ) -> None:
        """max_total_tokens: prompt and output together; what the model's context or the KV cache can hold.

        Raises RequestError if the prompt is empty or leaves no room for a single new token.
        """
        self.request_id = request_id
        self.sampling = sampling
        self.eos_token_ids = eos_token_ids
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self._check_room(max_total_tokens)
        self._set_stops(max_total_tokens)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.blocks: list[int] = []
        self.contiguous = True
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.num_preemptions = 0
        self.arrival = -1
        self.watched = False

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, tokens={self.num_tokens} "
            f"(prompt {self.num_prompt_tokens}, computed {self.num_computed_tokens}), blocks={self.blocks})"
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int) -> None:
        """Add one sampled token, and finish the request if the token or the length says so."""
        self.token_ids.append(token_id)
        total = len(self.token_ids)
        if token_id in self._stop_ids and total >= self._min_total:
            self.finish("stop", self._stop_ids[token_id])
        elif total >= self.token_limit:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Record the end. The blocks are the scheduler's to free: call Scheduler.finish from outside."""
        self.status = RequestStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def _check_room(self, max_total_tokens: int) -> None:
        if not self.token_ids:
            raise RequestError(f"request {self.request_id!r} has a prompt of 0 tokens; give it at least 1.")
        if self.num_prompt_tokens >= max_total_tokens:
            raise RequestError(
                f"request {self.request_id!r} has a prompt of {self.num_prompt_tokens} tokens, which leaves no "
                f"room for a new one: prompt and output may hold {max_total_tokens} together; "
                f"shorten the prompt to at most {max_total_tokens - 1} tokens."
            )

    def _set_stops(self, max_total_tokens: int) -> None:
        """Fold all token-level stops into one dictionary and two lengths, so that append() stays cheap."""
        sampling = self.sampling
        self.token_limit = max_total_tokens
        if sampling.max_tokens is not None:
            self.token_limit = min(max_total_tokens, self.num_prompt_tokens + sampling.max_tokens)
        self._min_total = self.num_prompt_tokens + sampling.min_tokens
        self._stop_ids: dict[int, int | None] = {token: token for token in sampling.stop_token_ids}
        if not sampling.ignore_eos:
            self._stop_ids |= dict.fromkeys(self.eos_token_ids)
