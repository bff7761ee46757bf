"""Parts that the answers of several endpoints share: usage, log-probabilities, reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexmoe.engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs, TokenRouting
from flexmoe.engine.token_text import token_bytes
from flexmoe.engine.tokenizer import Tokenizer

_WEIGHT_DIGITS = 4


def usage(outputs: Sequence[RequestOutput], num_generated: int | None = None) -> dict[str, Any]:
    """Tokens of a request. num_generated: if more were generated than the outputs show."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    generated = generated if num_generated is None else num_generated
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)},
    }


def timings(output: RequestOutput) -> dict[str, float | None]:
    """Seconds to the first token and, of the first choice, a token after it; as the engine took them."""
    metrics = output.metrics
    return {"ttft": metrics.ttft, "tpot": metrics.tpot(len(output.token_ids))}


def ending(sample: CompletionOutput) -> dict[str, Any]:
    """Why a choice ended."""
    return {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason}


class LogprobsWriter:
    """Log-probabilities in the forms of both endpoints."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def chat(self, entries: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        """As chat completions have them."""
        if entries is None:
            return None
        content = []
        for entry in entries:
            top = [self._entry(token, logprob) for token, logprob in entry.top]
            content.append({**self._entry(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": content}

    def completion(self, entries: Sequence[TokenLogprobs] | None, offset: int) -> dict[str, Any] | None:
        """As completions have them. offset: where the first token begins in the text."""
        if entries is None:
            return None
        tokens = [self._text(entry.token_id) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        tops = [{self._text(token): logprob for token, logprob in entry.top} for entry in entries]
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    def _text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")

    def _bytes(self, token: int) -> bytes:
        return _token_bytes(self._tokenizer, token)


class RoutingWriter:
    """The experts behind tokens, beside the text of a choice."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def of(self, sample: CompletionOutput, start: int, routing: Sequence[TokenRouting] | None) -> dict[str, Any]:
        """Of a sample's tokens from number `start` on. Nothing if it was not asked for."""
        if not routing:
            return {}
        tokens = [
            {
                "token": _token_bytes(self._tokenizer, token).decode(errors="replace"),
                "experts": entry.experts,
                "weights": [[round(weight, _WEIGHT_DIGITS) for weight in layer] for layer in entry.weights],
            }
            for token, entry in zip(sample.token_ids[start : start + len(routing)], routing, strict=True)
        ]
        return {"routing": {"layers": routing[0].layers, "tokens": tokens}}


def _token_bytes(tokenizer: Tokenizer | None, token: int) -> bytes:
    return str(token).encode() if tokenizer is None else token_bytes(tokenizer, token)
