"""Workload: what a service is asked, and how soon it should answer. Enters: figures, JSON or a trace. Leaves: requests.

Planner and simulator read the same one: the planner its Demand, a few figures, the simulator every request.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from flexmoe.errors import ConfigError, UnknownOptionError
from flexmoe.planner.arrivals import poisson
from flexmoe.planner.trace import TraceRequest, read_trace

Range = tuple[int, int]
_DEFAULT_REQUESTS = 1000


@dataclass(frozen=True, slots=True)
class Demand:
    """A workload in figures. rate: requests a second. Lengths in tokens; longest: prompt and answer together.

    requests: how many there are, about.
    """

    rate: float
    mean_input: float
    mean_output: float
    longest: int
    requests: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests and what is promised about them.

    input_len, output_len: tokens, drawn between the two numbers. rate: requests a second at random times. trace: a
    recorded one in their place (trace.py); with a rate it is thinned, or overlaid by copies of itself that begin at
    another moment, until it has that rate. length_scale: factor for its lengths. num_requests, duration (seconds): at
    most so many, for so long. slo_ttft_ms, slo_tpot_ms: an answer's first token, and each other on average, should not
    take longer.

    Raises ConfigError for values that make no workload.
    """

    input_len: Range = (512, 512)
    output_len: Range = (128, 128)
    rate: float | None = None
    trace: str | None = None
    length_scale: float = 1.0
    num_requests: int | None = None
    duration: float | None = None
    slo_ttft_ms: float | None = None
    slo_tpot_ms: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        for name in ("rate", "length_scale", "duration", "slo_ttft_ms", "slo_tpot_ms", "num_requests"):
            value: object = getattr(self, name)
            if value is not None and (not _is_number(value) or not value > 0):  # type: ignore[operator]
                raise ConfigError(f"{name}={value!r} of the workload is not a positive number.")
        for name in ("num_requests", "seed"):
            if not isinstance(getattr(self, name), int | None):
                raise ConfigError(f"{name}={getattr(self, name)!r} of the workload is not an integer.")
        if self.trace is None and self.rate is None:
            object.__setattr__(self, "rate", 1.0)

    @classmethod
    def from_json(cls, data: Any) -> Workload:
        """A workload from JSON's types. Keys may be left out; others are refused. Raises ConfigError."""
        if not isinstance(data, dict):
            raise ConfigError(f"a workload is a JSON object, not {type(data).__name__}.")
        known = [field.name for field in fields(cls)]
        for name in data:
            if name not in known:
                raise UnknownOptionError(str(name), known, "a workload")
        if not isinstance(data.get("trace"), str | None):
            raise ConfigError(f"trace={data['trace']!r} of the workload is not the name of a file.")
        return cls(**data)

    @classmethod
    def read(cls, path: str | Path) -> Workload:
        """A workload's JSON file, or a trace by itself. Raises ConfigError for what is neither."""
        path = Path(path)
        if path.suffix != ".json":
            return cls(trace=str(path))
        try:
            found = cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"the workload {path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            reason = error if isinstance(error, ConfigError) else f"it is not JSON: {error}"
            raise ConfigError(f"the workload {path} is refused: {reason}") from error
        # A trace is named from where the file lies.
        return found if found.trace is None else replace(found, trace=str(path.parent / found.trace))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; what is not set is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}

    def requests(self) -> list[TraceRequest]:
        """All requests, by arrival; answers have at least one token. Raises ConfigError for a trace that is none."""
        found = self._of_trace() if self.trace is not None else self._drawn()
        if self.duration is not None:
            found = [request for request in found if request.arrival <= self.duration]
        if not found:
            raise ConfigError("the workload has no request; raise its rate or its duration.")
        return found[: self.num_requests]

    def share(self, part: float) -> Workload:
        """A part of the requests, at random moments: what some of many equal replicas are asked."""
        rate = self.demand().rate * part
        count = None if self.num_requests is None else max(1, round(self.num_requests * part))
        return self if part == 1 else replace(self, rate=rate, num_requests=count)

    def demand(self) -> Demand:
        """Its figures; of a trace over all its requests."""
        if self.trace is None:
            assert self.rate is not None
            count = self.num_requests or (_DEFAULT_REQUESTS if self.duration is None else math.inf)
            expected = min(count, self.rate * self.duration if self.duration is not None else math.inf)
            inputs, outputs = fmean(self.input_len), fmean(self.output_len)
            return Demand(self.rate, inputs, outputs, self.input_len[1] + self.output_len[1], expected)
        requests = replace(self, rate=None, num_requests=None).requests()
        rate = self.rate or _rate(requests)
        expected = min(self.num_requests or math.inf, len(requests) * rate / _rate(requests))
        longest = max(request.input_len + request.output_len for request in requests)
        inputs = fmean(request.input_len for request in requests)
        outputs = fmean(request.output_len for request in requests)
        return Demand(rate, inputs, outputs, longest, expected)

    def _drawn(self) -> list[TraceRequest]:
        assert self.rate is not None
        count = self.num_requests or _DEFAULT_REQUESTS
        if self.duration is not None:
            # More than can be expected by so much that it practically never falls short.
            expected = self.rate * self.duration
            most = math.ceil(expected + 10 * math.sqrt(expected) + 10)
            count = min(self.num_requests or most, most)
        draw = random.Random(f"lengths {self.seed}")
        arrivals = poisson(self.rate, count, self.seed)
        return [TraceRequest(due, draw.randint(*self.input_len), draw.randint(*self.output_len)) for due in arrivals]

    def _of_trace(self) -> list[TraceRequest]:
        assert self.trace is not None
        requests = [self._scaled(request) for request in read_trace(Path(self.trace))]
        if self.rate is None:
            return requests
        own, span = _rate(requests), requests[-1].arrival
        draw = random.Random(f"copies {self.seed}")
        copies = self.rate / own
        found = list(itertools.chain.from_iterable(_copy(requests, span, copies - n, n, draw) for n in _whole(copies)))
        return sorted(found, key=lambda request: request.arrival)

    def _scaled(self, request: TraceRequest) -> TraceRequest:
        prompt, answer = (max(1, round(n * self.length_scale)) for n in (request.input_len, request.output_len))
        blocks = request.blocks if self.length_scale == 1 else ()  # a scaled block would be none of the cache's
        return TraceRequest(request.arrival, prompt, answer, blocks)


def _whole(copies: float) -> range:
    return range(math.ceil(copies))


def _copy(
    requests: list[TraceRequest], span: float, share: float, number: int, draw: random.Random
) -> Iterator[TraceRequest]:
    """One copy of a trace, of which a share below 1 is kept; all but the first begin at a moment of their own."""
    shift = draw.uniform(0, span) if number else 0.0
    for request in requests:
        if share >= 1 or draw.random() < share:
            yield replace(request, arrival=(request.arrival + shift) % span if shift else request.arrival)


def _rate(requests: list[TraceRequest]) -> float:
    """Requests a second; of a single one, one."""
    span = requests[-1].arrival
    return (len(requests) - 1) / span if span > 0 else float(len(requests))


def _range(name: str, value: Any) -> Range:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise ConfigError(f"{name}={value!r} of the workload is neither a number of tokens nor two of them.")
    low, high = pair
    if not 1 <= low <= high:
        raise ConfigError(f"{name}={value!r} of the workload does not go upwards from 1; use for instance [64, 256].")
    return low, high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
