"""What a request gives back. Enters: nothing but values. Leaves: frozen records, each with the whole answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one chosen token under the raw model, before penalties, temperature and filters.

    rank: 1 for the most likely token. top: the best (token id, log-probability) pairs, most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """Experts behind one chosen token: those of the row whose logits chose it. L MoE layers, K experts each.

    layers [L]: their numbers. experts [L][K]: logical experts. weights [L][K]: their shares, as they were combined.
    """

    layers: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a request.

    finish_reason: None while it runs; "stop" (end-of-sequence token, stop token or stop string), "length"
    (max_tokens or the model's context is full), "abort", "error" (see RequestOutput.error). stop_reason: the stop
    string or stop token id that ended it; None for the model's own end-of-sequence token. logprobs: one entry a token,
    or None if not asked for. routing: the same of the first tokens, as many as asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    routing: tuple[TokenRouting, ...] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds of `time.monotonic()`; None for what has not happened yet. num_cached_tokens: reused prompt."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    num_cached_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    def tpot(self, num_tokens: int) -> float | None:
        """Seconds per token after the first, of a finished sample of `num_tokens` tokens."""
        if self.first_token is None or self.finished is None or num_tokens < 2:
            return None
        return (self.finished - self.first_token) / (num_tokens - 1)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and all its samples so far; `text` and `token_ids` are those of the first sample.

    error: why this request alone could not go on; None if all is well.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival=0.0))
    error: str | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids
