"""Scheduler: what the next step computes. Enters: requests, sampled tokens. Leaves: steps, finished requests.

Continuous batching: every step takes the next token of each decoding request, then chunks of prompts in order of
arrival, up to a budget of tokens, which is as large as pays, and larger where nobody reads along (see roofline). Beside
a decoding request that is watched, whose tokens somebody reads as they come, prompts get what keeps the step within
`max_decode_slowdown` times its decodes alone, by what steps of this run took (see pace). Where no request is watched
only throughput counts, and decodes beside prompts are a second pass over the weights: decodes then wait while prompts
fill whole steps, and prompts until they do.

First come, first served: requests start in order of arrival, and when blocks run out the latest goes back to waiting,
to be recomputed (its tokens are kept). Hence

    arrivals of the running  <  arrivals of the waiting

at any time, which keeps both queues sorted. Nothing starves: the oldest request advances in every step, or waits for
prompts of those that run or find a seat, which come to an end, or for room that the decodes before it make.

A request gets blocks for all its tokens when it is admitted, and one at a time as it decodes. Nothing counts as
computed before update() says so, so a step that failed on the way can be scheduled again.

Running ahead. While step n is computed, schedule_ahead() may give step n+1, to be launched behind it; update(n) comes
before update(n+1), and schedule() when no step is on its way. A request that ends at update(n), or is aborted, leaves a
row in step n+1 that nobody wants but that still writes its key; so do the rows of a step that was given up. No harm:

1.  A row writes the keys of positions that are not computed: chunk.start >= request.num_computed_tokens.
2.  Only blocks full of computed tokens are shared or registered in the prefix cache. By 1, a row on its way writes none
    of them, and update() registers no block before it learns that all rows that wrote there are done.
3.  So what such a row writes belongs to its request alone. When the request ends, the block becomes blank, not idle:
    its content is not kept. Its next owner gets it in a later step, which takes effect later (see
    ModelRunner.launch), and reads no position before it has written it.
4.  A request that lives on computes the positions of a step that was given up once more, before it reads them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

from flexmoe.config.engine import SchedulerConfig
from flexmoe.errors import RequestError
from flexmoe.scheduling.block_manager import BlockManager
from flexmoe.scheduling.pace import Pace
from flexmoe.scheduling.request import FinishReason, Request, RequestStatus
from flexmoe.scheduling.roofline import StepTokens
from flexmoe.scheduling.step import ScheduledChunk, Step

_Partial = tuple[Request, int]  # a running request that lacks more than one token, and from where on
_IDLE = 0.125  # share of seats, or of blocks, that may stand empty until prompts fill a step
_RUNNING = RequestStatus.RUNNING  # looked up once a token: an Enum member costs more than a global


class Scheduler:
    """Decides which tokens of which requests are computed together."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, tokens: StepTokens | None = None, *, one_pass: bool = False
    ) -> None:
        """tokens: what pays on the device; None: a small model's on a CPU. A budget that the config has comes first.

        one_pass: decodes and prompts of a step read the weights once.
        """
        self.config, self.blocks, self._one_pass = config, blocks, one_pass
        self.sizes = (tokens or StepTokens()).asked(config.max_num_batched_tokens)
        self._pace = Pace(self.sizes, config.max_decode_slowdown)
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._arrivals = count()
        self.num_watched, self.watched_elsewhere = 0, False  # of all requests; on another data rank
        self._retry_at = 0  # value of blocks.num_gained below which the first waiting request cannot fit

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def max_tokens(self) -> int:
        """The budget of a step, at most."""
        return self.sizes.widest

    @property
    def _budget(self) -> int:
        """Of the next step."""
        return self.sizes.most if self.num_watched or self.watched_elsewhere else self.max_tokens

    @property
    def _seats(self) -> int:
        """Requests that may run: a step must have a token for each."""
        return min(self.config.seats, self.sizes.most)

    @property
    def num_tokens(self) -> int:
        """Tokens that the KV cache can hold of one request that runs alone."""
        return self.blocks.num_tokens

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError if its id is taken or if it could not finish even alone."""
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is still being served; use another id.")
        if request.token_limit > self.blocks.num_tokens:
            raise RequestError(
                f"request {request.request_id!r} has a prompt of {request.num_prompt_tokens} tokens and may "
                f"reach {request.token_limit}, but the KV cache holds {self.blocks.num_tokens} "
                f"({self.blocks.num_blocks} blocks of {self.blocks.block_size}); "
                "shorten the prompt, lower max_tokens or raise kv_cache_memory."
            )
        request.arrival = next(self._arrivals)
        self._requests[request.request_id] = request
        self.num_watched += request.watched
        self._waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any time. None if no request of that id is unfinished.

        Between schedule() and update() its chunk stays in the step: computing it is useless but harmless (see
        the module's text), and update() skips it. But request.blocks is empty from here on, so whoever computes
        the step reads them before, or leaves out the chunk.
        """
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request and free its blocks at once. If it has finished already, only the reason changes."""
        if self._requests.get(request.request_id) is request:  # its id may serve another one by now
            self._forget(request)
            if request.status is _RUNNING:
                self._running.remove(request)
                self.blocks.free(request)
            else:
                self._waiting.remove(request)
                self._retry_at = 0  # another one may be first now
        request.finish(reason, stop_reason)

    def schedule(self) -> Step:
        """Choose the next step. Without chunks when nothing can run."""
        decodes: list[ScheduledChunk] = []
        preempted: list[Request] = []
        partial = self._schedule_decodes(decodes, preempted)
        # With a prefix to share one that was preempted might fit again at once: not in the same step.
        prefills = self._schedule_prompts(decodes, partial, admit=not preempted)
        return Step(decodes + prefills, len(decodes), preempted)

    def schedule_ahead(self, step: Step, *, prompts: bool = False) -> Step | None:
        """The step behind one of which the tokens are not known yet: the next token of all that are sure to go on.

        step: being computed; update() was called for all steps before it, and schedule() not since it was chosen.
        prompts: whether the step may also compute prompts. Requests that ended meanwhile are left out, and those that
        the pending token ends by their length.

        None if the next step has to wait for these tokens: there are too few blocks (nobody is preempted here); nobody
        goes on; or, without `prompts`, a prompt is not complete, or a request waits that schedule() might admit then,
        by what is known now. So what makes room unforeseen (a stop, an abort, a prefix to share), and with `prompts`
        also what an end by length makes, may let a waiting request in one step later than without; in that step older
        requests may need the blocks themselves.

        A decode's chunk is the pending token, so that its start is the number of tokens that are known.
        """
        chunks = [chunk for chunk in step.chunks if chunk.request.status is _RUNNING]
        decodes: list[ScheduledChunk] = []
        goes_on: dict[Request, int] = {}  # where an incomplete prompt does
        gain = 0
        for chunk in chunks:
            request, end = chunk.request, chunk.start + chunk.num_tokens
            if not chunk.samples:
                goes_on[request] = end
            elif end + 1 < request.token_limit:
                decodes.append(ScheduledChunk(request, end, 1, True))
            else:
                gain += self.blocks.gain_of(request)
        whole = not goes_on and len(chunks) == len(self._running)
        if not prompts and not (whole and decodes and not self._might_admit(decodes, gain)):
            return None
        if not self._grow_ahead(decodes):
            return None
        prefills = self._prompts_ahead(chunks, goes_on, decodes) if prompts else []
        return Step(decodes + prefills, len(decodes), []) if decodes or prefills else None

    def expect(self, step: Step) -> None:
        """Do some of update(step) beforehand, while it is computed: nothing that anybody sees. May be left out."""
        for chunk in step.chunks[step.num_decodes :]:
            if chunk.request.status is _RUNNING:
                self.blocks.expect(chunk.request, chunk.start + chunk.num_tokens)

    def update(self, step: Step, sampled: Sequence[int]) -> list[Request]:
        """Record that a step was computed.

        sampled: one token for each chunk that samples, in their order; those of requests that ended meanwhile are
        among them, and are dropped. Returns the requests that finished now; their blocks are free.
        """
        if len(sampled) != step.num_samples:
            raise ValueError(f"{len(sampled)} tokens were sampled for a step that samples {step.num_samples}")
        tokens, finished = iter(sampled), list[Request]()
        for chunk in step.chunks:
            token = next(tokens) if chunk.samples else None
            request = chunk.request
            if request.status is not _RUNNING:
                continue
            assert chunk.start == request.num_computed_tokens, f"{chunk} is recorded twice, or out of order"
            end = request.num_computed_tokens = chunk.start + chunk.num_tokens
            if chunk.num_tokens > 1 or end % self.blocks.block_size == 0:  # a block may have filled
                self.blocks.register(request)
            if token is not None:
                request.append(token)
                if request.status is not _RUNNING:
                    finished.append(request)
        if finished:
            self._remove(finished)
        return finished

    def observe(self, step: Step, seconds: float) -> None:
        """Learn how long a step took, from which later ones are cut to size."""
        self._pace.observe(step.num_decodes, step.num_tokens - step.num_decodes, seconds)

    def check_integrity(self) -> None:
        """Raise AssertionError if the queues or the blocks contradict each other."""
        self.blocks.check_integrity()
        running, waiting = self._running, list(self._waiting)
        arrivals = [request.arrival for request in running + waiting]
        _require(arrivals == sorted(set(arrivals)), f"queues are not in order of arrival: {arrivals}")
        _require(set(running + waiting) == set(self._requests.values()), "a request is in no queue, or in two")
        bad = [r for r in running if r.status is not _RUNNING or not r.blocks or r.num_computed_tokens >= r.num_tokens]
        _require(not bad, f"requests run without blocks, or with nothing left to compute: {bad}")
        bad = [r for r in waiting if r.status is not RequestStatus.WAITING or r.blocks or r.num_computed_tokens]
        _require(not bad, f"requests wait with blocks, or with another status: {bad}")
        _require(len(running) <= self._seats, f"{len(running)} requests run, at most {self._seats} may")

    def _schedule_decodes(self, decodes: list[ScheduledChunk], preempted: list[Request]) -> list[_Partial]:
        """Schedule the next token of each decoding request. Returns the running ones with more to compute.

        Decodes never exceed the token budget: a request is only admitted if it leaves each running one a token.
        """
        size = self.blocks.block_size
        partial = []
        for request in self._running:  # preemption shortens this list from its end while it is walked
            total = len(request.token_ids)
            computed = request.num_computed_tokens
            if total - computed > 1:
                partial.append((request, computed))
            elif total <= len(request.blocks) * size or self._make_room(request, preempted):
                decodes.append(ScheduledChunk(request, computed, 1, True))
        return partial

    def _schedule_prompts(
        self, decodes: list[ScheduledChunk], partial: Sequence[_Partial], *, ending: int = 0, admit: bool = True
    ) -> list[ScheduledChunk]:
        """Chunks of prompts beside these decodes, which are dropped if they have to wait; newcomers may join them.

        ending: requests that are neither but still have seats. admit: whether requests may start.
        """
        prefills: list[ScheduledChunk] = []
        budget = self._budget_beside(decodes, sum(request.num_tokens - start for request, start in partial)) - ending
        for request, start in partial:
            budget -= self._schedule_prefill(request, start, budget, prefills)
        if admit:
            self._admit(budget, decodes, prefills)
        if len(decodes) + sum(chunk.num_tokens for chunk in prefills) > self._budget:
            decodes.clear()
        return prefills

    def _budget_beside(self, decodes: Sequence[ScheduledChunk], begun: int, ended: int = 0, gain: int = 0) -> int:
        """Tokens that prompts may have beside these decodes, or in their place. begun: what running prompts lack.

        ended: of the running requests those that will have ended by then, gain: blocks that will be free besides.
        """
        budget = self._budget
        left = budget - len(decodes)
        if self.num_watched:
            watched = any(chunk.request.watched for chunk in decodes)
            return min(left, self._pace.limit(len(decodes))) if watched else left
        if not decodes or self._one_pass:
            return left
        running, free = len(self._running) - ended, self.blocks.num_free + gain
        ready, more = self._ready(begun, running, free, budget)
        if ready >= budget:
            return budget
        idle = min(1 - running / self._seats, free / self.blocks.num_blocks)
        return 0 if more and idle <= _IDLE else left

    def _ready(self, begun: int, running: int, free: int, budget: int) -> tuple[int, bool]:
        """Prompt tokens that could be computed with so many requests running and blocks free, counted up to a whole
        step; and whether others lack room.
        """
        free, seats = free - running, self._seats
        for taken, request in enumerate(self._waiting, running):
            free -= request.num_tokens // self.blocks.block_size + 1
            if begun >= budget or taken >= seats or free < 0:
                return begun, True
            begun += request.num_tokens
        return begun, False

    def _make_room(self, request: Request, preempted: list[Request]) -> bool:
        """Give a request its next block, preempting the latest ones if need be. False if it is the latest itself.

        Requests before this one are never preempted, so no chunk of this step has to be withdrawn.
        """
        while not self.blocks.grow(request):
            victim = self._running.pop()
            self.blocks.free(victim)
            victim.status = RequestStatus.WAITING
            victim.num_computed_tokens = 0
            victim.num_preemptions += 1
            self._waiting.appendleft(victim)
            self._retry_at = 0
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _admit(self, budget: int, decodes: list[ScheduledChunk], prefills: list[ScheduledChunk]) -> None:
        """Start waiting requests in order while budget, seats and blocks last; nobody overtakes the first.

        A block is kept free for each running request, lest the newcomer is thrown out by their next tokens.
        """
        while self._waiting and budget > 0 and len(self._running) < self._seats:
            if self.blocks.num_gained < self._retry_at:
                return
            request = self._waiting[0]
            shortfall = self.blocks.allocate(request, keep_free=len(self._running))
            if shortfall:
                self._retry_at = self.blocks.num_gained + shortfall
                return
            self._waiting.popleft()
            request.status = _RUNNING
            self._running.append(request)
            start = request.num_computed_tokens
            chunks = decodes if start == request.num_tokens - 1 else prefills
            budget -= self._schedule_prefill(request, start, budget, chunks)

    def _might_admit(self, decodes: Sequence[ScheduledChunk], gain: int) -> bool:
        """Whether somebody who waits may start once only these decode and blocks.num_gained has grown by `gain`."""
        if not self._waiting or len(decodes) >= self._seats or self.blocks.num_gained + gain < self._retry_at:
            return False
        return self._budget_beside(decodes, 0, len(self._running) - len(decodes), gain) > 0

    def _prompts_ahead(
        self, coming: Sequence[ScheduledChunk], goes_on: dict[Request, int], decodes: list[ScheduledChunk]
    ) -> list[ScheduledChunk]:
        """What schedule() would compute of prompts beside these decodes, once the step with `coming` is over.

        goes_on: from where on, of prompts in it. Of a prompt that lacks one token, it is a decode like any other.
        """
        sampled = {chunk.request for chunk in coming if chunk.samples}
        ending = len(sampled) - len(decodes)
        partial: list[_Partial] = []
        for request in self._running if len(sampled) < len(self._running) else ():
            if request not in sampled:
                start = goes_on.get(request, request.num_computed_tokens)
                if start == request.num_tokens - 1:
                    decodes.append(ScheduledChunk(request, start, 1, True))
                else:
                    partial.append((request, start))
        return self._schedule_prompts(decodes, partial, ending=ending)

    def _grow_ahead(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Give each request a block for its chunk if it lacks one. False, and nothing has changed, if too few are free.

        Should the step be given up, the requests keep these blocks: they are the next that they need.
        """
        size = self.blocks.block_size
        short = [chunk.request for chunk in chunks if chunk.start >= len(chunk.request.blocks) * size]
        if len(short) > self.blocks.num_free:
            return False
        for request in short:
            self.blocks.grow(request)
        return True

    def _schedule_prefill(self, request: Request, start: int, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Append as much of a request's tokens from `start` on as the budget allows. Returns how many."""
        missing = request.num_tokens - start
        num_tokens = min(missing, budget)
        if num_tokens > 0:
            chunks.append(ScheduledChunk(request, start, num_tokens, num_tokens == missing))
        return max(0, num_tokens)

    def _remove(self, finished: list[Request]) -> None:
        for request in finished:
            self._forget(request)
            self.blocks.free(request)
        self._running = [request for request in self._running if request.status is _RUNNING]

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        self.num_watched -= request.watched


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
