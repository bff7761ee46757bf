"""The background server of FlexFlow's scripts. Enters: prompts from any thread. Leaves: their outputs.

One thread computes for all, and takes in new requests between steps, so that those of several threads (a web
framework's, say) share batches and a short one need not wait for a long one. One, also because OpenMP gives each
thread that computes workers of its own: a pool of threads that take turns would fight for the cores.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import EngineError

if TYPE_CHECKING:
    from flexmoe import LLM, RequestOutput


@dataclass(slots=True)
class _Job:
    """The prompts of one call of `run`. outputs: those that finished, by the prompt's place."""

    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    error: BaseException | None = None
    abandoned: bool = False  # its caller was interrupted: nobody waits for it
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Running:
    """One prompt that is being computed."""

    job: _Job
    place: int
    stream: Iterator[RequestOutput]


class Server:
    """Runs one `flexmoe.LLM` for many threads. It can be stopped and started as often as one likes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()  # of _thread and _closed
        self._closed = False

    @property
    def serving(self) -> bool:
        return self._thread is not None

    def start_server(self) -> None:
        """Start the thread, if it is not there. Scripts of 2023 never say so: `run` does it too."""
        with self._guard:
            self._start()

    def stop_server(self) -> None:
        """Answer what was asked before, then end the thread. Nothing happens if it does not serve."""
        with self._guard:
            if self._thread is not None:
                self._jobs.put(None)
                self._thread.join()
                self._thread = None

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Complete prompts of token ids, together with those of other threads.

        If the caller is interrupted while it waits, its prompts are given up.
        """
        job = _Job(prompts, params)
        with self._guard:
            self._start()
            self._jobs.put(job)
        try:
            job.done.wait()
        except BaseException:
            job.abandoned = True
            raise
        if job.error is not None:
            raise job.error
        return [job.outputs[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Stop, after answering what was asked before, and free the model. May be called twice."""
        self.stop_server()
        with self._guard:
            self._closed = True
        self.llm.close()

    def _start(self) -> None:
        if self._closed:
            raise EngineError("this LLM was closed; call llm.compile(...) to load the model again.")
        if self._thread is None:
            # A daemon: a script that ends, or dies, without stop_server must not wait for ever.
            self._thread = threading.Thread(target=self._serve, name="flexmoe.serve", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        running: list[_Running] = []
        stopping = False
        while running or not stopping:
            if not stopping and not (running and self._jobs.empty()):
                job = self._jobs.get()
                stopping = job is None
                running += [] if job is None else self._admit(job)
            else:
                # Reading the streams in turns steps the engine once a round for all of them.
                running = [one for one in running if self._advance(one)]

    def _admit(self, job: _Job) -> list[_Running]:
        pairs = zip(job.prompts, job.params, strict=True)
        running = [_Running(job, place, self.llm.stream(ids, params)) for place, (ids, params) in enumerate(pairs)]
        if not running:
            job.done.set()
        return running

    def _advance(self, one: _Running) -> bool:
        """Read what one prompt has by now. False when it is over: answered, failed, or nobody waits for it."""
        job = one.job
        if job.error is not None or job.abandoned:
            _close(one.stream)
            return False
        try:
            output = next(one.stream)
        except BaseException as error:  # noqa: BLE001  (raised in the thread whose job it is: none may wait for ever)
            job.error = error
            job.done.set()
            return False
        if output.finished:
            _close(one.stream)
            job.outputs[one.place] = output
            if len(job.outputs) == len(job.prompts):
                job.done.set()
        return not output.finished


def _close(stream: Iterator[RequestOutput]) -> None:
    """End a stream now: its request is aborted unless it has finished."""
    if isinstance(stream, Generator):
        stream.close()
