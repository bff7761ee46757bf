"""estimate: what a plan would give a workload. Enters: a candidate, its step times, a demand. Leaves: an Estimate.

A replica in its steady state has B requests that decode together. Between two tokens of theirs, B / (tokens an answer)
new prompts are computed, since as many requests end; where they are several, together. So a token takes

    tpot(B) = decode(B) + B / output x prompt        and B requests give B / tpot(B) tokens a second.

Both grow with B. The B that a rate of requests leads to, and the largest B that keeps the promised times and fits the
KV cache, are found by bisection. A first token comes after half a step that is under way, another one where steps are
launched ahead, the prompts before it (as in a queue with random arrivals and equal services), its own prompt, and a
decode step beside it. Both times hold what an HTTP server adds, if the machine tells; throughput is the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.server import usual_chunk_rate
from flexmoe.config.serving import Serving
from flexmoe.planner.space import Candidate
from flexmoe.planner.steps import Steps
from flexmoe.planner.workload import Demand

Terms = Mapping[str, float]
PROMPTS, WAITING, SERVING = "prompts", "waiting", "serving"
# What stops the largest batch.
MEMORY, SEATS, TIMES = "KV cache", "max_num_seqs", "promised times"
_BUSIEST = 0.98  # of the time in prompts: above, a queue only grows


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What is asked of a service. Seconds; None: nothing is promised."""

    ttft: float | None = None
    tpot: float | None = None

    @classmethod
    def from_ms(cls, ttft_ms: float | None, tpot_ms: float | None) -> Promise:
        """The same in milliseconds."""
        seconds = [None if value is None else value / 1e3 for value in (ttft_ms, tpot_ms)]
        return cls(ttft=seconds[0], tpot=seconds[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A candidate's prediction.

    refused: why it cannot run; nothing else is known then. missed: what it falls short of at the demanded rate, "" if
    of nothing; hopeless: it breaks a promise at any rate. batch: requests that decode together in a replica at the
    demanded rate; most: as many as times promised and memory allow, and limit: which of them stops it.
    ttft, tpot: seconds, at the demanded rate. throughput: output tokens a second of all replicas with `most` requests
    each. first, token, work: the terms of ttft, of tpot, and of one over throughput.
    rate: requests a second that all replicas answer at most. extrapolated: the machine's tables do not reach so far.
    """

    candidate: Candidate
    refused: str = ""
    missed: str = ""
    hopeless: bool = False
    batch: int = 0
    most: int = 0
    limit: str = ""
    ttft: float = 0.0
    tpot: float = 0.0
    throughput: float = 0.0
    first: Terms = field(default_factory=dict)
    token: Terms = field(default_factory=dict)
    work: Terms = field(default_factory=dict)
    rate: float = 0.0
    extrapolated: bool = False


def estimate(candidate: Candidate, steps: Steps, demand: Demand, promise: Promise, limits: SchedulerConfig) -> Estimate:
    """Predict. steps: of the candidate's plan."""
    longest = min(demand.longest, limits.max_model_len or demand.longest)
    refused = steps.refusal(longest)
    if refused:
        return Estimate(candidate=candidate, refused=refused)
    return _Steady(candidate, steps, demand, promise, limits).estimate()


class _Steady:
    """One replica in its steady state."""

    def __init__(
        self, candidate: Candidate, steps: Steps, demand: Demand, promise: Promise, limits: SchedulerConfig
    ) -> None:
        self.candidate, self.steps, self.demand, self.promise = candidate, steps, demand, promise
        self.data_ranks = candidate.plan.data_parallel_size
        self.rate = demand.rate / candidate.replicas
        machine = steps.cost.machine
        self.serving, self.chunk_rate = machine.serving or Serving(0.0), usual_chunk_rate(machine.device.kind)
        self.beside = not machine.is_shared
        self.context = round(demand.mean_input + demand.mean_output / 2)
        self.prompt = steps.prompt(round(demand.mean_input))
        tokens = demand.mean_input + demand.mean_output
        by_memory = self.data_ranks * int(steps.kv_tokens / tokens)
        seats = self.data_ranks * limits.seats
        self.bound = max(1, min(seats, by_memory))
        self.limit = MEMORY if by_memory < seats else SEATS

    def estimate(self) -> Estimate:
        """All figures."""
        batch = _least(self.bound, lambda b: b / self._token_seconds(b) >= self.rate * self.demand.mean_output)
        most = _most(self.bound, self._keeps_promise)
        working = most or 1
        tpot = self._token_seconds(batch or self.bound)
        first = self._first(batch or self.bound)
        at_once = working * self.candidate.replicas
        work = {name: seconds / at_once for name, seconds in self._computed(working).items()}
        limit = self.limit if most == self.bound else TIMES
        return Estimate(
            candidate=self.candidate, missed=self._missed(batch), hopeless=not most, batch=batch or self.bound,
            most=working, limit=limit, ttft=sum(first.values()), tpot=tpot, throughput=1 / sum(work.values()),
            first=first, token=self._token(batch or self.bound), work=work, rate=self._most_requests(),
            extrapolated=self.steps.extrapolated,
        )  # fmt: skip

    def _missed(self, batch: int) -> str:
        """What is not kept, in words."""
        if not batch:
            return f"answers {self._most_requests():.3g} requests/s, asked are {self.demand.rate:.3g}"
        first, token = sum(self._first(batch).values()), self._token_seconds(batch)
        for name, value, promised in (("TTFT", first, self.promise.ttft), ("TPOT", token, self.promise.tpot)):
            if promised is not None and value > promised:
                return f"{name} {value * 1e3:.3g} ms, promised are {promised * 1e3:.3g}"
        return ""

    def _most_requests(self) -> float:
        """A second, of all replicas, whatever is promised."""
        seconds, output = self._token_seconds(self.bound), self.demand.mean_output
        if self.bound == 1:  # prompts of as many requests as it can answer, not of as many as come
            seconds += self._prompts(1 / output) - self._prompts(self._ended(1))
        return self.bound / seconds / output * self.candidate.replicas

    def _keeps_promise(self, batch: int) -> bool:
        promise = self.promise
        if promise.tpot is not None and self._token_seconds(batch) > promise.tpot:
            return False
        return promise.ttft is None or sum(self._first(batch).values()) <= promise.ttft

    def _token_seconds(self, batch: int) -> float:
        return sum(self._token(batch).values())

    def _token(self, batch: int) -> Terms:
        """Terms of the time between two tokens of a request, with so many at once, as a client sees it."""
        computed = self._computed(batch)
        if not self.serving.streams:
            return computed
        seconds = sum(computed.values())
        sent = min(1.0, self.chunk_rate * seconds / batch)  # of the steps: what the server lets cross
        return {**computed, SERVING: sent * self.serving.longer(batch, seconds, beside=self.beside)}

    def _computed(self, batch: int) -> Terms:
        """Terms of the same in the engine."""
        return {**self._decode(batch), PROMPTS: self._prompts(self._ended(batch))}

    def _ended(self, batch: int) -> float:
        """Requests that end in a step, and are replaced by new prompts."""
        return (min(1.0, self.rate * self.demand.mean_output) if batch == 1 else batch) / self.demand.mean_output

    def _prompts(self, ended: float) -> float:
        """Seconds that a step has for so many prompts, on average: of whole numbers of them the two beside."""
        # Data ranks compute theirs at once, if they have some at the same time.
        number = max(ended / self.data_ranks, min(1.0, ended))
        below = int(number)
        low, high = (self.steps.prompts(count, round(self.demand.mean_input)) for count in (below, below + 1))
        return low + (number - below) * (high - low)

    def _decode(self, batch: int) -> Terms:
        return self.steps.decode(-(-batch // self.data_ranks), self.context)

    def _first(self, batch: int) -> Terms:
        """Terms of the time to a first token, with so many requests decoding beside it."""
        ended = self._ended(batch)
        decode, prompts = sum(self._decode(batch).values()), self._prompts(ended)
        prompt, busy = prompts / ended, min(_BUSIEST, prompts / (decode + prompts))
        queue = busy / (2 * (1 - busy)) * prompt
        launched = decode + prompts if self.steps.ahead else 0.0
        served = self.serving.request(round(self.demand.mean_input))
        first = {**self.prompt, WAITING: queue + decode * 1.5 + launched}
        return first if not served else {**first, SERVING: served}


def _least(most: int, holds: Callable[[int], bool]) -> int:
    """The least number from 1 to `most` from which on it holds; 0 if it holds for none."""
    if not holds(most):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _most(most: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` up to which it holds; 0 if it does not hold for 1."""
    if holds(most):
        return most
    return _least(most, lambda number: not holds(number)) - 1
