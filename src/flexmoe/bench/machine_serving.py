"""Measures what an HTTP server adds to an engine's times. Enters: a device, seconds. Leaves: Serving, if it can.

A server of the built-in model, in a process of its own, is asked over loopback as `flexmoe bench serve` asks. With each
answer it tells what its engine took to the first token: what the client waited beyond that is the request's. What
streams cost is the time of answers in pieces beside that of the same answers at once, by turns, over the steps whose
tokens were sent.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator

from flexmoe.bench.endpoint import Answer, Endpoint, EndpointOptions, Prepared, RequestFailed
from flexmoe.bench.load import Planned
from flexmoe.bench.machine_jobs import Notify
from flexmoe.bench.own_server import own_server, why_not
from flexmoe.bench.subject import open_subject
from flexmoe.config.serving import Serving
from flexmoe.errors import FlexMoEError

_LENGTHS = (16, 512)  # tokens of prompts
_STREAMS, _TOKENS = (1, 4, 16), 64  # of an answer
_PAUSES = 0.05, 0.25  # seconds before a request
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50
_SETTLE = {"cuda": 10.0}  # seconds in which an idle engine records graphs, so that it does not while it is asked


def measure_serving(device: str, seconds: float, notify: Notify) -> Serving | None:
    """Within about so many seconds, and those that the server takes to start."""
    notify("what a server adds")
    with open_subject(None) as subject:
        reason = why_not(subject)
        if reason is None:
            try:
                with own_server(subject, ["--device", device]) as url:
                    return asyncio.run(ask(url, seconds, _SETTLE.get(device.partition(":")[0], 0.0)))
            except (FlexMoEError, RequestFailed) as error:
                reason = str(error)
    notify(f"what a server adds is left out: {reason}")
    return None


async def ask(url: str, seconds: float, settle: float = 0.0) -> Serving:
    """Measure a server that has nothing else to do. Raises RequestFailed, ConfigError."""
    async with Endpoint(EndpointOptions(url=url)) as endpoint:
        client = _Client(endpoint, (await endpoint.served()).model)
        for length in _LENGTHS:
            await client.beside_engine(length)
        for streams in _STREAMS:
            await client.longer_step(streams)
        await asyncio.sleep(settle)
        share = seconds / (len(_LENGTHS) + len(_STREAMS))
        short, long = [await _median(lambda n=n: client.beside_engine(n), share) for n in _LENGTHS]  # type: ignore[misc]
        points = [(n, await _median(lambda n=n: client.longer_step(n), share)) for n in _STREAMS]  # type: ignore[misc]
    token = max(0.0, (long - short) / (_LENGTHS[1] - _LENGTHS[0]))
    return Serving(max(0.0, short - _LENGTHS[0] * token), token, tuple((n, max(0.0, each)) for n, each in points))


async def _median(measure: Callable[[], Awaitable[float]], seconds: float) -> float:
    end, found = time.monotonic() + seconds, list[float]()
    while len(found) < _LEAST_ROUNDS or (time.monotonic() < end and len(found) < _MOST_ROUNDS):
        found.append(await measure())
    return statistics.median(found)


class _Client:
    """Asks one server for one model. No prompt comes twice, so that none is found in a cache."""

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint, self._model = endpoint, model
        self._random, self._numbers = random.Random(0), iter(range(2**31))

    async def beside_engine(self, length: int) -> float:
        """Seconds to the first token beside what the engine took to it. After a pause, so that all sleep, as they do
        where requests come now and then.
        """
        (request,), answer = self._prepared(1, length, 1), Answer()
        await asyncio.sleep(self._random.uniform(*_PAUSES))
        start = time.perf_counter()
        await self._endpoint.ask(request, answer)
        return answer.texts[0] - start - float(answer.timings["ttft"])

    async def longer_step(self, streams: int) -> float:
        """Seconds by which a step is longer whose tokens go to so many streams."""
        at_once = await self._seconds(self._endpoint.ask_whole(one) for one in self._prepared(streams, 16, _TOKENS))
        answers = [Answer() for _ in range(streams)]
        asked = zip(self._prepared(streams, 16, _TOKENS), answers, strict=True)
        in_pieces = await self._seconds(self._endpoint.ask(one, answer) for one, answer in asked)
        sent = sum(len(answer.texts) for answer in answers) / streams
        return (in_pieces - at_once) / sent

    def _prepared(self, count: int, length: int, tokens: int) -> list[Prepared]:
        prompts = [self._random.choices(range(1, 1000), k=length) for _ in range(count)]
        planned = [Planned(next(self._numbers), None, prompt, tokens) for prompt in prompts]
        return [self._endpoint.prepare(one, self._model) for one in planned]

    async def _seconds(self, requests: Iterator[Awaitable[None]]) -> float:
        start = time.perf_counter()
        await asyncio.gather(*requests)
        return time.perf_counter() - start
