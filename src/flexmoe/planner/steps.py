"""Steps: what the steps of one plan take. Enters: a cost model, and steps of the scheduler. Leaves: seconds by term.

A simulation asks millions of times. So sizes are rounded to five binary digits (3% apart, below 32 exact), and several
prompts of one step count as equal ones with the same sum: what was asked before is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from flexmoe.planner.cost_model import Chunk, CostModel, StepShape
from flexmoe.planner.memory import MemoryUse
from flexmoe.planner.operations import BITS
from flexmoe.scheduling.data_ranks import JointStep
from flexmoe.scheduling.step import ScheduledChunk, Step

Terms = Mapping[str, float]

_DIGITS = 5
_REPLICA_SHARE = 0.25  # of the memory that weights leave, which replicas of experts may take from the KV cache


class Steps:
    """Step times and memory of a plan. step_tokens: computed together at most, by each data rank.

    widest: the same where nobody reads along, for which there must be memory; 0: no more.
    """

    def __init__(self, cost: CostModel, step_tokens: int = 2048, widest: int = 0) -> None:
        self.cost, self.step_tokens, self._widest = cost, step_tokens, max(step_tokens, widest)
        self.beyond: set[str] = set()  # terms that reached past what was measured, of all that was asked
        self._terms: dict[tuple[int, ...], Terms] = {}
        self._seconds: dict[tuple[int, ...], float] = {}

    @property
    def ahead(self) -> bool:
        """Whether an engine of this plan chooses steps, those with prompts too, when the one before begins."""
        return self.cost.machine.device.kind == "cuda" and self.cost.plan.num_ranks == 1

    @property
    def extrapolated(self) -> bool:
        """Whether anything asked so far reached past what was measured."""
        return bool(self.beyond)

    def refusal(self, max_tokens: int) -> str:
        """Why a request of so many tokens has no room, "" if it has."""
        return "" if max_tokens <= self.kv_tokens else self.cost.memory(max_tokens, self._widest).reason

    @cached_property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache of a data rank can hold."""
        return self._memory.kv_tokens

    @cached_property
    def _memory(self) -> MemoryUse:
        """Without a cache."""
        return self.cost.memory(0, self._widest)

    @property
    def spare_experts(self) -> int:
        """Replicas of experts that each rank has room for."""
        moe, plan = self.cost.model.moe, self.cost.plan
        if moe is None:
            return 0
        use = self._memory
        width = moe.expert_width // plan.expert_tensor_size
        size = 3 * self.cost.model.hidden_size * width * BITS[self.cost.quantization or self.cost.dtype] / 8
        return int(_REPLICA_SHARE * max(0, use.capacity - use.total) / size)

    def prompt(self, tokens: int) -> Terms:
        """Of a prompt alone, in as many steps as it needs; each data rank computes one as long."""
        total: dict[str, float] = {}
        for start in range(0, tokens, self.step_tokens):
            size = min(self.step_tokens, tokens - start)
            for name, seconds in self._lookup((0, 0, 1, size, start)).items():
                total[name] = total.get(name, 0.0) + seconds
        return total

    def prompts(self, count: int, tokens: int) -> float:
        """Seconds of so many prompts, each as long: as many in one step as fit into it, and so on."""
        if tokens > self.step_tokens:
            return count * sum(self.prompt(tokens).values())
        steps, rest = divmod(count, self.step_tokens // tokens)
        full = self.step_tokens // tokens
        return sum(
            times * sum(self._lookup((0, 0, number, number * tokens, 0)).values())
            for times, number in ((steps, full), (1, rest)) if times and number
        )  # fmt: skip

    def decode(self, rows: int, context: int) -> Terms:
        """Of one token for each of so many requests on each data rank."""
        return self._lookup((rows, context, 0, 0, 0))

    def terms(self, step: Step) -> Terms:
        """Of a step as it was scheduled."""
        return self._lookup(_key(step))

    def seconds(self, step: Step) -> float:
        """The sum of its terms."""
        key = _key(step)
        found = self._seconds.get(key)
        if found is None:
            found = self._seconds[key] = sum(self._lookup(key).values())
        return found

    def _lookup(self, key: tuple[int, ...]) -> Terms:
        found = self._terms.get(key)
        if found is None:
            cost = self.cost.step(_shape(key))
            self.beyond |= cost.extrapolated
            found = self._terms[key] = cost.terms
        return found


def _key(step: Step) -> tuple[int, ...]:
    """Decodes and their mean context; chunks of prompts, their tokens and the mean that is computed before them."""
    part = max(step.parts, key=lambda part: part.num_tokens) if isinstance(step, JointStep) else step
    chunks, decodes = part.chunks, part.num_decodes
    context = sum([chunk.start for chunk in chunks[:decodes]]) // decodes + 1 if decodes else 0
    if decodes == len(chunks):
        return _coarse(decodes), _coarse(context), 0, 0, 0
    return _coarse(decodes), _coarse(context), *_prompts(chunks[decodes:])


def _prompts(chunks: Sequence[ScheduledChunk]) -> tuple[int, int, int]:
    tokens = sum([chunk.num_tokens for chunk in chunks])
    return (
        len(chunks),
        max(len(chunks), _coarse(tokens)),
        _coarse(sum([chunk.start for chunk in chunks]) // len(chunks)),
    )


def _shape(key: tuple[int, ...]) -> StepShape:
    decodes, context, prompts, tokens, cached = key
    size, larger = divmod(tokens, prompts) if prompts else (0, 0)
    return StepShape(decodes, context, tuple(Chunk(size + (at < larger), cached) for at in range(prompts)))


def _coarse(number: int) -> int:
    shift = number.bit_length() - _DIGITS
    return number if shift <= 0 else (number + (1 << shift - 1)) >> shift << shift
