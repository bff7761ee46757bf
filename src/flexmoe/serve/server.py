"""The background server of FlexFlow's scripts. Enters: prompts from any thread. Leaves: their outputs.

One thread computes for all: it takes whatever requests have gathered and runs them together, so that those of several
threads (a web framework's, say) share batches. One, also because OpenMP gives each thread that computes workers of its
own: a pool of threads that take turns would fight for the cores.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexmoe.config.sampling import SamplingParams

if TYPE_CHECKING:
    from flexmoe import LLM, RequestOutput


@dataclass(slots=True)
class _Job:
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    outputs: list[RequestOutput] = field(default_factory=list)
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Server:
    """Runs one `flexmoe.LLM` for many threads. It can be stopped and started as often as one likes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._guard = threading.Lock()  # of _thread

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
        """Complete prompts of token ids, together with those of other threads."""
        job = _Job(prompts, params)
        with self._guard:
            self._start()
            self._jobs.put(job)
        job.done.wait()
        if job.error is not None:
            raise job.error
        return job.outputs

    def close(self) -> None:
        """Stop and free the model."""
        self.stop_server()
        self.llm.close()

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: a script that ends, or dies, without stop_server must not wait for ever.
            self._thread = threading.Thread(target=self._serve, name="flexmoe.serve", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            stop = False
            while not (stop or self._jobs.empty()):
                following = self._jobs.get()
                stop = following is None
                if following is not None:
                    jobs.append(following)
            self._compute(jobs)
            for answered in jobs:
                answered.done.set()
            if stop:
                return

    def _compute(self, jobs: Sequence[_Job]) -> None:
        """One call of the engine for all. If one of several is refused, each gets its own answer or error."""
        try:
            outputs = self.llm.generate(
                [p for job in jobs for p in job.prompts], [s for job in jobs for s in job.params]
            )
        except BaseException as error:  # noqa: BLE001  (raised in the thread whose job it is: none may wait for ever)
            if len(jobs) == 1:
                jobs[0].error = error
            else:
                for job in jobs:
                    self._compute([job])
        else:
            for job in jobs:
                job.outputs, outputs = outputs[: len(job.prompts)], outputs[len(job.prompts) :]
