"""Serving: a server under load, as its clients see it. Enters: ServeOptions. Leaves: a row, and each request's Outcome.

Open loop (a rate, a trace): requests are sent when they are due, whatever became of earlier ones; with `concurrency`
those beyond it wait, and that is counted. Closed loop: `concurrency` requests are always under way. Beside the server's
times stand those of this program, so that a client that was too slow can be told from a server that was.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from flexmoe.bench.endpoint import Answer, Endpoint, EndpointOptions, Prepared, RequestFailed, Served
from flexmoe.bench.load import LoadOptions, plan, warm_up
from flexmoe.bench.outcomes import INTERRUPTED, NOT_SENT, Outcome, Row, Slo, result, spread
from flexmoe.bench.record import facts
from flexmoe.config.machine import Machine
from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError
from flexmoe.planner.recorded import Speed, served_floor

DEFAULT_CONCURRENCY = 16
DEFAULT_VOCAB_SIZE = 1000  # where the server does not tell: below what any model has
_LAG_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """concurrency: requests under way at most; None: 16 in a closed loop, without limit in an open one.

    vocab_size: token ids of prompts are below it; None: what the server tells. machine: what the server runs on, for
    the floor of what it does; None: not known, and so neither is the floor.
    """

    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    load: LoadOptions = field(default_factory=LoadOptions)
    slo: Slo = field(default_factory=Slo)
    concurrency: int | None = None
    vocab_size: int | None = None
    machine: Machine | None = None

    @property
    def limit(self) -> int | None:
        """Requests under way at most."""
        return self.concurrency or (DEFAULT_CONCURRENCY if self.load.is_closed else None)


@dataclass(frozen=True, slots=True)
class Report:
    """row: for the file of rows. interrupted: by Ctrl-C, so some requests were not sent or not answered."""

    row: Row
    outcomes: list[Outcome]
    interrupted: bool


def measure(options: ServeOptions, notify: Callable[[str], None] = lambda _: None) -> Report:
    """Put the load on the server. notify: hears of each stage. Ctrl-C ends it with what there is.

    Raises ConfigError for a server that cannot be asked, and for files that are not understood.
    """
    return asyncio.run(_measure(options, notify))


async def _measure(options: ServeOptions, notify: Callable[[str], None]) -> Report:
    async with Endpoint(options.endpoint) as endpoint:
        served = await endpoint.served()
        vocab_size = _vocab_size(options, served, notify)
        if not served.is_listed:
            notify(f"The server lists no models; {served.model!r} is asked for all the same.")
        notify(f"{served.model}: preparing requests")
        requests, before = (
            [endpoint.prepare(request, served.model) for request in planned(options.load, vocab_size)]
            for planned in (plan, warm_up)
        )
        if not requests:
            raise ConfigError("no request is due within the duration; give a longer one or a higher rate.")
        run = Run(endpoint, options.limit)
        if before:
            notify(f"{served.model}: {len(before)} requests to warm up")
            _tell_failed(await run.all(before), notify)
        notify(f"{served.model}: {len(requests)} requests")
        run = Run(endpoint, options.limit, was_interrupted=run.was_interrupted)
        outcomes = await run.all(requests)
    found = result(outcomes, options.slo) | {"most_running": run.most_running, "client": run.client()}
    row = _row(options, served, vocab_size, found)
    return Report(with_floor(row, _speed(options.machine, served)), outcomes, run.was_interrupted)


def with_floor(row: Row, speed: Speed | None, config: ModelConfig | None = None) -> Row:
    """The row, with the floor of what it measured. config: of the model, if what the server calls it says nothing."""
    measured = {key: value for key, value in row["result"].items() if key != "floor_unknown"}
    return row | {"result": measured | served_floor(row, speed, config)}


def _speed(machine: Machine | None, served: Served) -> Speed | None:
    if machine is None:
        return None
    return Speed(machine.device.read_bandwidth, machine.device.flops(str((served.engine or {}).get("dtype"))))


def _vocab_size(options: ServeOptions, served: Served, notify: Callable[[str], None]) -> int:
    told = options.vocab_size or served.vocab_size
    if told is None and not options.load.text and options.load.prompts is None:
        notify(
            f"The server does not tell the size of its vocabulary: token ids below {DEFAULT_VOCAB_SIZE} are used; "
            "--vocab-size sets another."
        )
    return told or DEFAULT_VOCAB_SIZE


def _tell_failed(outcomes: Sequence[Outcome], notify: Callable[[str], None]) -> None:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        first = failed[0]
        notify(f"warm-up: {len(failed)} of {len(outcomes)} requests failed: {first.error}: {first.message}")


class Run:
    """One load on one server."""

    def __init__(self, endpoint: Endpoint, limit: int | None, *, was_interrupted: bool = False) -> None:
        """limit: requests under way at most. was_interrupted: nothing is sent."""
        self._endpoint = endpoint
        self._places = asyncio.Semaphore(limit or sys.maxsize)
        self._outcomes: dict[int, Outcome] = {}
        self._lags: list[float] = []
        self._running = 0
        self._start = self._cpu_start = self._seconds = self._cpu_seconds = 0.0
        self.most_running = 0
        self.was_interrupted = was_interrupted

    async def all(self, requests: Sequence[Prepared]) -> list[Outcome]:
        """Send them and wait for the answers: one Outcome for each request, whatever happens."""
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        work = asyncio.create_task(self._send(requests))
        lag = asyncio.create_task(self._watch_lag())
        if self.was_interrupted:
            work.cancel()
        with _on_interrupt(lambda: self._interrupt(work)), suppress(asyncio.CancelledError):
            await work
        lag.cancel()
        self._seconds = self._now()
        self._cpu_seconds = time.process_time() - self._cpu_start
        return [self._outcomes.get(request.number) or _unsent(request) for request in requests]

    def client(self) -> Row:
        """How well this program kept up: when it sent, when it was awake, how busy it was."""
        return {
            "late_ms": spread(outcome.late for outcome in self._outcomes.values()),
            "loop_lag_ms": spread(self._lags),
            "cpu_percent": round(100 * self._cpu_seconds / self._seconds, 1) if self._seconds else None,
        }

    # ------------------------------------------------------------------ sending

    async def _send(self, requests: Sequence[Prepared]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for request in requests:
                if request.due is None:
                    await self._places.acquire()
                    tasks.create_task(self._one(request, self._now()))
                    continue
                # Even for no time, if it is late: tasks that were made run only while this one waits.
                await asyncio.sleep(max(0.0, request.due - self._now()))
                tasks.create_task(self._queued(request, request.due, self._now() - request.due))

    async def _queued(self, request: Prepared, due: float, late: float) -> None:
        """Wait for a place first."""
        await self._places.acquire()
        await self._one(request, due, late)

    async def _one(self, request: Prepared, due: float, late: float | None = None) -> None:
        """In a place: ask, then write down what became of it and free the place. late: None in a closed loop."""
        answer, sent = Answer(), self._now()
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        error: str | None = INTERRUPTED
        message: str | None = None
        try:
            await self._endpoint.ask(request, answer)
            error = None
        except RequestFailed as failure:
            error, message = failure.kind, failure.message
        finally:
            queued = None if late is None else max(0.0, sent - due - late)
            about = {"number": request.number, "due": due, "late": late, "queued": queued, "sent": sent}
            self._outcomes[request.number] = _outcome(answer, about, self._start, self._now(), error, message)
            self._running -= 1
            self._places.release()

    # ------------------------------------------------------------------ this program

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _interrupt(self, work: asyncio.Task[None]) -> None:
        self.was_interrupted = True
        work.cancel()

    async def _watch_lag(self) -> None:
        """How much later than asked for the event loop comes round: as late may texts be read."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LAG_SECONDS)
            self._lags.append(max(0.0, time.perf_counter() - before - _LAG_SECONDS))


def _outcome(
    answer: Answer, about: dict[str, Any], start: float, now: float, error: str | None, message: str | None
) -> Outcome:
    """about: number, and when it was sent. start: of the run, on the clock of the texts; now: after that."""
    sent = start + about["sent"]
    usage = answer.usage
    details = usage.get("prompt_tokens_details")
    return Outcome(
        **about,
        ended=now,
        texts=tuple(moment - sent for moment in answer.texts),
        prompt_tokens=_count(usage, "prompt_tokens"),
        output_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, dict) else None,
        finish_reason=answer.finish_reason,
        error=error,
        message=message,
    )


def _count(usage: dict[str, Any], name: str) -> int | None:
    return usage[name] if type(usage.get(name)) is int else None


def _unsent(request: Prepared) -> Outcome:
    return Outcome(number=request.number, due=request.due, error=NOT_SENT)


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Within, Ctrl-C calls `stop`; a second one acts as before. Other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGINT)

    def once() -> None:
        restore()
        stop()

    def restore() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)

    loop.add_signal_handler(signal.SIGINT, once)
    try:
        yield
    finally:
        restore()


def _row(options: ServeOptions, served: Served, vocab_size: int, found: Row) -> Row:
    """Without the key. What the server says of itself stands in `config`; all else is of the client's machine."""
    load, endpoint = options.load, options.endpoint
    params = {
        name: str(value) if name in ("trace", "prompts") and value else value for name, value in asdict(load).items()
    }
    params |= {name: getattr(endpoint, name) for name in ("endpoint", "temperature", "ignore_eos", "timeout")}
    params |= {"concurrency": options.limit, "vocab_size": vocab_size}
    machine = None if options.machine is None else options.machine.name
    config = {
        "url": endpoint.base,
        "machine": machine,
        "version": served.version,
        "served": served.about,
        "engine": served.engine,
    }
    return {
        "benchmark": "serve",
        "engine": served.about.get("owned_by"),
        "model": {"name": served.model},
        "params": params,
        "config": config | {"client": f"aiohttp {version('aiohttp')}"},
        "result": found,
    } | facts()
