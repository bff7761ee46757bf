"""Replica: one engine on a virtual clock. Enters: requests, and what a step takes. Leaves: when each got its tokens.

The scheduler, the block manager and the prefix cache are the engine's own; only the model is missing. As in an engine,
a step is chosen when the one before has ended, or, where steps are launched ahead, when it begins; and a request's
tokens are there at the end of their step. Where it is known what a server adds, a request is added when the server is
done with it, and steps whose tokens are sent take longer; which these are is the rule of `engine/async_engine.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.config.serving import Serving
from flexmoe.planner.trace import BLOCK_TOKENS, TraceRequest
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.data_ranks import DataRanks, scheduler_for
from flexmoe.scheduling.request import Request
from flexmoe.scheduling.roofline import StepTokens
from flexmoe.scheduling.scheduler import Scheduler
from flexmoe.scheduling.step import Step

StepSeconds = Callable[[Step], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What a simulated engine has: limits of a step, and the KV cache, of each of its data ranks.

    tokens: of a step, what pays on the device; None: on a CPU. watched: answers are streamed, so that prompts give way
    to decodes. ahead: steps are launched before the tokens of the one before are known, those with prompts, too.
    one_pass: see Scheduler. serving: what the server before it adds; None: nothing. chunk_rate: pieces of streams that
    it lets cross in a second. beside: these are sent while a device of its own computes.
    """

    scheduler: SchedulerConfig
    num_blocks: int
    block_size: int = 16
    data_ranks: int = 1
    prefix_caching: bool = False
    tokens: StepTokens | None = None
    watched: bool = True
    ahead: bool = False
    one_pass: bool = False
    serving: Serving | None = None
    chunk_rate: float = 1000.0
    beside: bool = False

    def ready(self, asked: TraceRequest) -> float:
        """When a request can be scheduled."""
        return asked.arrival + (0.0 if self.serving is None else self.serving.request(asked.input_len))

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        room = self.num_blocks * self.block_size
        return min(room, self.scheduler.max_model_len or room)

    def make_scheduler(self) -> Scheduler | DataRanks:
        """The engine's own scheduler, empty."""
        blocks = [BlockManager(self.num_blocks, self.block_size, self.prefix_caching) for _ in range(self.data_ranks)]
        return scheduler_for(self.scheduler, blocks, self.tokens, one_pass=self.one_pass)


@dataclass(slots=True, eq=False)
class Served:
    """A request and its moments, in seconds after the start. None: not yet. cut: tokens that were more than fit."""

    arrival: float
    input_len: int
    output_len: int
    cut: int = 0
    first: float | None = None
    end: float | None = None

    @property
    def ttft(self) -> float:
        assert self.first is not None
        return self.first - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token."""
        if self.output_len < 2 or self.end is None or self.first is None:
            return None
        return (self.end - self.first) / (self.output_len - 1)


@dataclass(slots=True)
class Replica:
    """An engine that is simulated. outstanding: tokens of its requests that have not ended, as the router counts."""

    limits: EngineLimits
    seconds: StepSeconds
    busy: float = 0.0
    steps: int = 0
    preemptions: int = 0
    outstanding: int = 0
    scheduler: Scheduler | DataRanks = field(init=False)
    _step: Step | None = None
    _ahead: Step | None = None
    _seconds: float = 0.0
    _next_crossing: float = 0.0
    _served: dict[str, Served] = field(default_factory=dict)
    _blocks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = self.limits.make_scheduler()

    @property
    def is_idle(self) -> bool:
        return self._step is None

    @property
    def kv_used(self) -> float:
        """Share of the blocks that requests hold."""
        blocks = self.scheduler.blocks
        return 1 - blocks.num_free / blocks.num_blocks

    def add(self, number: int, asked: TraceRequest) -> Served:
        """A request arrives. Its lengths are cut to what the engine takes."""
        prompt = min(asked.input_len, self.limits.longest - 1)
        answer = min(max(1, asked.output_len), self.limits.longest - prompt)
        served = Served(asked.arrival, prompt, answer, asked.input_len + max(1, asked.output_len) - prompt - answer)
        request = Request(
            str(number), self._tokens(number, asked, prompt), _sampling(answer), eos_token_ids=(),
            max_total_tokens=self.limits.longest,
        )  # fmt: skip
        request.watched = self.limits.watched
        self.scheduler.add(request)
        self._served[request.request_id] = served
        self.outstanding += prompt + answer
        return served

    def begin(self, now: float) -> float | None:
        """Choose the next step. Returns the seconds that it takes, None if there is nothing to do."""
        step, self._ahead = self._ahead or self.scheduler.schedule(), None
        self.preemptions += len(step.preempted)
        if not step.chunks:
            self._step = None
            return None
        self._step = step
        if self.limits.ahead:
            self._ahead = self.scheduler.schedule_ahead(step, prompts=True)
        self.steps += 1
        self._seconds = self._with_streams(step, now)
        self.busy += self._seconds
        return self._seconds

    def _with_streams(self, step: Step, now: float) -> float:
        """What the step takes, with sending what it gives to those that decode. First tokens count with requests."""
        seconds, serving = self.seconds(step), self.limits.serving
        if serving is None or now + self._seconds < self._next_crossing:
            return seconds
        seconds += serving.longer(step.num_decodes, seconds, beside=self.limits.beside)
        self._next_crossing = now + seconds + step.num_decodes / self.limits.chunk_rate
        return seconds

    def finish(self, now: float) -> int:
        """The step has ended. Returns how many tokens it gave."""
        step = self._step
        assert step is not None, "no step is being computed"
        self.scheduler.observe(step, self._seconds)
        tokens = step.num_samples
        ended = self.scheduler.update(step, [0] * tokens)
        for chunk in step.chunks:
            request = chunk.request
            if chunk.samples and len(request.token_ids) - request.num_prompt_tokens == 1:
                self._served[request.request_id].first = now
        for request in ended:
            served = self._served.pop(request.request_id)
            served.end = now
            self.outstanding -= served.input_len + served.output_len
        return tokens

    def _tokens(self, number: int, asked: TraceRequest, length: int) -> list[int]:
        """A prompt that shares with others what the trace says it shares, and nothing else.

        Blocks are numbered as they come: a trace's own numbers may be hashes, too large for tokens.
        """
        numbers = (self._blocks.setdefault(block, len(self._blocks)) for block in asked.blocks)
        shared = list(chain.from_iterable([block] * BLOCK_TOKENS for block in numbers))[:length]
        return shared + [-1 - number] * (length - len(shared))


@lru_cache(maxsize=4096)
def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)
