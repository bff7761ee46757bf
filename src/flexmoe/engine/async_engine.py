"""AsyncEngine: an engine on a thread of its own, asyncio in front. Enters: requests. Leaves: streams of their outputs.

The thread alone touches the engine: what others want of it comes as commands through a queue, carried out between
steps. Outputs cross to the event loop together. A stream keeps the latest output only, which holds the whole answer so
far, so that a reader who is slow, or gone, costs no memory and holds up nobody.

Each output that crosses costs the event loop tens of microseconds, on cores that a model on a CPU needs itself. So no
more than some thousands cross in a second: a few streams get every token by itself, of many quick ones several tokens
cross as one output. First and last tokens never wait.

If a step fails the engine is dead: every stream ends with the error, and so does each later request. A step that does
not come back can be ended by nobody: past a bound the engine counts as hung, what waits ends with an error, later
requests are refused, and all goes on if the step should end after all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.engine import Engine
from flexmoe.engine.expert_looks import ExpertLooks
from flexmoe.engine.outputs import RequestOutput
from flexmoe.errors import EngineDeadError, EngineError, FlexMoEError, RequestFailedError

_log = logging.getLogger(__name__)

T = TypeVar("T")

# An idle engine looks so often whether its processes still live.
_WATCH_SECONDS = 1.0
# How long the thread may take to come back from its last step, once all is over.
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to complete. stream: outputs are wanted as they grow, not only the last one."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stream: bool = False


class Stream:
    """The outputs of one request, read with `async for` by one task; close it when it is not read to its end.

    Raises RequestFailedError if the request could not go on, EngineError if the engine died or was closed.
    """

    def __init__(self, request_id: str, num_samples: int, close: Callable[[str], None]) -> None:
        self.request_id, self.num_samples = request_id, num_samples
        self._close = close
        self._latest: RequestOutput | None = None
        self._error: FlexMoEError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._over = False

    def put(self, output: RequestOutput) -> None:
        """Called in the event loop, with each output or with some left out."""
        self._latest = output
        self._wake()

    def fail(self, error: FlexMoEError) -> None:
        """No more will come."""
        self._error = error
        self._wake()

    def close(self) -> None:
        """End the request, unless it has ended."""
        if not self._over:
            self._over = True
            self._close(self.request_id)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._over:
            raise StopAsyncIteration
        while self._latest is None:
            if self._error is not None:
                self._over = True
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        output, self._latest = self._latest, None
        self._over = output.finished
        if output.error is not None:
            raise RequestFailedError(output.error)
        return output

    async def last(self) -> RequestOutput:
        """The finished output."""
        output = None
        async for output in self:  # noqa: B007 - the last one is wanted
            pass
        assert output is not None, "a stream ends with an output or with an error"
        return output

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class AsyncEngine:
    """Runs an engine for the tasks of one event loop. It owns the engine from here on, and closes it."""

    def __init__(
        self,
        engine: Engine,
        *,
        expert_interval: float = 0.0,
        max_output_rate: float = 2000.0,
        step_seconds: float = 0.0,
        on_death: Callable[[EngineError], None] | None = None,
    ) -> None:
        """expert_interval: seconds between looks at which experts are chosen, 0 for none. max_output_rate: outputs a
        second that cross to the event loop, first and last ones not counted. step_seconds: that a step may take before
        the engine counts as hung, 0 for any time. on_death: called in the event loop.
        """
        self.engine = engine
        self._looks = ExpertLooks(engine, expert_interval)
        self.experts = self._looks.metrics
        self.error: EngineError | None = None
        self._on_death = on_death
        self._seconds_each, self._next_crossing = 1 / max_output_rate, 0.0
        self._step_seconds = 0.0  # that the latest step took
        self._most_seconds, self._since = step_seconds, 0.0  # since: when the step in progress began; 0: there is none
        self._watching: asyncio.Task[None] | None = None
        self._asked: set[asyncio.Future[Any]] = set()  # commands that somebody waits for
        self._streams: dict[str, Stream] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._work, name="flexmoe.engine", daemon=True)

    @property
    def num_streams(self) -> int:
        """Requests that were accepted and have not ended."""
        return len(self._streams)

    @property
    def num_samples(self) -> int:
        """Samples of these."""
        return sum(stream.num_samples for stream in self._streams.values())

    @property
    def running_seconds(self) -> float:
        """How long the step in progress has taken so far; 0 between two."""
        since = self._since
        return time.monotonic() - since if since else 0.0

    @property
    def hang(self) -> str | None:
        """Why the engine counts as hung; None if it does not."""
        seconds, most = self.running_seconds, self._most_seconds
        if not 0 < most < seconds:
            return None
        return f"the engine hangs: a step has been running for {seconds:.0f} s, longer than step_seconds={most:g}."

    def look_every(self, seconds: float | None) -> None:
        """Look at the experts more often while somebody watches; None: as usual. An engine that never looks does not.

        What looking costs keeps its bound.
        """
        self._looks.every(seconds)

    def start(self) -> None:
        """Begin to work for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        if self._most_seconds > 0:
            self._watching = self._loop.create_task(self._watch())

    async def submit(self, jobs: Sequence[Job]) -> list[Stream]:
        """Queue all of the jobs or, if one of them is refused, none. Raises RequestError, EngineError."""
        streams = [Stream(job.request_id, job.sampling.n, self._abort) for job in jobs]
        self._streams |= {stream.request_id: stream for stream in streams}
        try:
            await self.call(lambda: self._add(jobs))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def call(self, work: Callable[[], T]) -> T:
        """Let the engine's thread do something between two steps.

        Raises what it raises, EngineError if the engine is dead or hangs.
        """
        if self.error is not None:
            raise self.error
        if (hang := self.hang) is not None:
            raise EngineError(hang)
        future: asyncio.Future[T] = self._loop.create_future()
        self._asked.add(future)
        try:
            self._inbox.put(lambda: self._carry_out(work, future))
            return await future
        finally:
            self._asked.discard(future)

    async def drain(self, seconds: float) -> None:
        """Wait until all streams have ended; those that have not after so many seconds end with an EngineError."""
        deadline = time.monotonic() + seconds
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._fail_all(EngineError("the server shuts down, and this request was not finished in time."))

    async def close(self) -> bool:
        """End what runs, and the engine. Raises nothing: an engine that died has said why.

        False: its thread does not come back from a step, and is left to the end of the process.
        """
        self._fail_all(EngineError("the engine was closed."))
        self._inbox.put(None)
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._thread.join, _END_SECONDS)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------------------------------- in the event loop

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._inbox.put(lambda: self.engine.discard([request_id]))

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
                if output.finished:
                    del self._streams[output.request_id]

    def _fail_all(self, error: EngineError) -> None:
        for request_id, stream in list(self._streams.items()):
            stream.fail(error)
            self._abort(request_id)

    async def _watch(self) -> None:
        """End what waits for an engine that hangs, once each time."""
        told = False
        while True:
            await asyncio.sleep(min(_WATCH_SECONDS, self._most_seconds / 4))
            hang, before = self.hang, told
            told = hang is not None
            if hang is not None and not before:
                _log.critical(hang)
                self._fail_all(EngineError(hang))
                for future in self._asked:
                    _settle(future, None, EngineError(hang))
            elif before and not told:
                _log.warning("the engine goes on: the step that hung has ended.")

    def _bury(self, error: EngineError) -> None:
        self._fail_all(error)
        if self._on_death is not None:
            self._on_death(error)

    # ------------------------------------------------------------------------------------------ in the engine's thread

    def _work(self) -> None:
        try:
            while self._obey():
                if self.engine.has_unfinished:
                    self._advance()
        except BaseException as error:  # noqa: BLE001 - all who wait must hear of it
            self._die(error)
        try:
            self.engine.close()
        except Exception:  # noqa: BLE001 - nobody waits for more than the thread
            if self.error is None:  # else its processes may be gone, and that has been said
                _log.exception("the engine did not end in order")

    def _obey(self) -> bool:
        """Carry out the commands that are there; if there is nothing else to do, wait for one. False: it is over."""
        prepares = False
        while True:
            if not self.engine.has_unfinished:
                with self._timed():
                    self._looks.end()
            try:
                if self.engine.has_unfinished or prepares:
                    command = self._inbox.get_nowait()
                else:
                    command = self._inbox.get(timeout=_WATCH_SECONDS)
            except queue.Empty:
                if self.engine.has_unfinished:
                    return True
                self.engine.check()
                with self._timed():
                    prepares = self.engine.prepare()
                continue
            if command is None:
                return False
            command()

    def _advance(self) -> None:
        """Compute a step, and let cross what is due."""
        start = time.monotonic()
        report = start + self._step_seconds >= self._next_crossing  # which will be true once the step is over
        with self._timed():
            self._looks.begin()
            outputs = self.engine.step(report=report)
        end = time.monotonic()
        self._step_seconds = end - start
        if report:
            self._next_crossing = end + len(outputs) * self._seconds_each
        if outputs:
            self._tell(self._deliver, outputs)
        with self._timed():
            self._looks.stepped(end - start)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """What the device is at within is a step, which may hang."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = 0.0

    def _add(self, jobs: Sequence[Job]) -> None:
        added: list[str] = []
        try:
            for job in jobs:
                self.engine.add_request(
                    job.prompt_token_ids, job.sampling, request_id=job.request_id, stream=job.stream
                )
                added.append(job.request_id)
        except Exception:
            self.engine.discard(added)
            raise

    def _carry_out(self, work: Callable[[], T], future: asyncio.Future[T]) -> None:
        try:
            if self.error is not None:
                raise self.error
            result = work()
        except Exception as error:  # noqa: BLE001 - raised where it was asked for
            self._tell(_settle, future, None, error)
        else:
            self._tell(_settle, future, result, None)

    def _die(self, cause: BaseException) -> None:
        error = EngineDeadError(f"the engine died: {type(cause).__name__}: {cause}")
        self.error = error
        _log.critical("the engine is dead", exc_info=cause)
        self._tell(self._bury, error)
        while (command := self._inbox.get()) is not None:  # whoever asks from now on is told, and waits for nothing
            with contextlib.suppress(Exception):
                command()

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[T], result: Any, error: Exception | None) -> None:
    if future.done():  # nobody waits any more
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
