"""What a request must be to be served. Enters: a prompt, sampling parameters, limits. Leaves: token ids, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexmoe.config.model import ModelConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.detokenizer import Detokenizer
from flexmoe.engine.grammar import Grammars
from flexmoe.engine.numbers import int32s
from flexmoe.engine.sampler import SamplingState
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.engine.tracking import Sample
from flexmoe.errors import RequestError
from flexmoe.scheduling.request import Request

# Keep apart the seeds of requests that gave none, and of the samples of one request; the second is the golden ratio in
# 64 bits, no small multiple of the first, so that no sample of one request equals one of a neighbour.
_REQUEST_STRIDE = 1_000_003
_SAMPLE_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks requests and makes their samples.

    context, cache: tokens that prompt and output may have together, by the model and by the KV cache. stages: of the
    pipeline.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    grammars: Grammars | None
    seed: int
    context: int
    cache: int
    stages: int = 1

    @property
    def max_model_len(self) -> int:
        return min(self.context, self.cache)

    def check(self, prompt: Sequence[int], sampling: SamplingParams) -> tuple[int, ...]:
        """The prompt's token ids. Raises RequestError for what cannot be served."""
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling_params={sampling!r} is not SamplingParams.")
        if not is_list(prompt):
            raise RequestError(f"the prompt is of type {type(prompt).__name__}; use a string or a list of token ids.")
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token.")
        self.check_length(len(prompt))
        ids = tuple(prompt)
        if not self._are_tokens(ids):
            self._refuse_tokens(ids)
        self._check_tokenizer(sampling)
        if sampling.routing:
            self._check_routing()
        return ids

    def _are_tokens(self, ids: tuple[int, ...]) -> bool:
        """In few passes of C: thousands of tokens one by one would be a third of a millisecond before the first step.

        Measured, 2,048 tokens: 75 us; with the set of the types, min and max 220.
        """
        if list(map(type, ids)).count(int) != len(ids):
            return False
        try:
            numbers = int32s(ids).view(np.uint32)
        except OverflowError:  # below 0, or beyond 32 bits
            return False
        return bool(numbers.max() < self.config.vocab_size)

    def _refuse_tokens(self, ids: tuple[int, ...]) -> None:
        """Name the first that is no token."""
        vocab = self.config.vocab_size
        for position, token in enumerate(ids):
            if type(token) is not int:
                raise RequestError(
                    f"token id {token!r} at position {position} of the prompt is of type {type(token).__name__}; "
                    "use Python's int."
                )
            if not 0 <= token < vocab:
                raise RequestError(
                    f"token id {token} at position {position} of the prompt is outside of the vocabulary; "
                    f"use 0 to {vocab - 1}."
                )

    def sample(
        self, request_id: str, number: int, index: int, ids: tuple[int, ...], sampling: SamplingParams
    ) -> Sample:
        """Sample `index` of the request that is the engine's `number`-th."""
        seed = self.seed + number * _REQUEST_STRIDE if sampling.seed is None else sampling.seed
        eos = self.config.eos_token_ids
        request = Request(
            request_id if index == 0 else f"{request_id}/{index}",
            ids,
            sampling,
            eos_token_ids=eos,
            max_total_tokens=self.max_model_len,
        )
        schema, grammars = sampling.json_schema, self.grammars
        state = SamplingState(
            sampling,
            seed + index * _SAMPLE_STRIDE,
            ids,
            eos_token_ids=eos,
            vocab_size=self.config.vocab_size,
            grammar=None if schema is None or grammars is None else grammars.matcher(schema),
        )
        detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer, ids, sampling)
        return Sample(request, state, detokenizer)

    def _check_tokenizer(self, sampling: SamplingParams) -> None:
        if self.tokenizer is not None:
            return
        if sampling.stop:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids.")
        if sampling.json_schema is not None:
            raise RequestError("a JSON schema needs a tokenizer, and this model has none; leave it out.")

    def _check_routing(self) -> None:
        if self.config.moe is None:
            raise RequestError(f"{self.config.architecture} has no experts, so no routing to tell.")
        if self.stages > 1:
            raise RequestError(
                "no rank sees the experts of all layers; use pipeline_parallel_size=1 to ask for routing."
            )

    def check_length(self, length: int, *, least: bool = False) -> None:
        """Raises RequestError for a prompt of so many tokens that leaves no room for a new one. least: or of more."""
        limit = self.max_model_len
        if length < limit:
            return
        if limit < self.context:
            holder = f"the KV cache of {limit} tokens"
            remedy = "raise kv_cache_memory" if limit > 1 else "raise block_size"
        else:
            holder, remedy = f"the context of max_model_len={limit}", ""
        raise RequestError(
            f"the prompt has {'at least ' * least}{length} tokens, but {holder} must also hold at least one new token; "
            f"shorten it to {limit - 1} tokens{remedy and ' or ' + remedy}."
        )


def is_list(value: object) -> bool:
    """Whether this is a sequence of things of its own: a text or bytes is not, though Python calls it one."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))
