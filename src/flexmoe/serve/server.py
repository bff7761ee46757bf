"""The background server of FlexFlow's scripts. Enters: prompts from any thread. Leaves: their outputs.

There is no thread behind it: whoever asks computes. But callers that meet wait in one queue, and the next to compute
takes all that have gathered, so that requests of several threads (a web framework's, say) share batches.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import EngineError

if TYPE_CHECKING:
    from flexmoe import LLM, RequestOutput


@dataclass(slots=True)
class _Job:
    prompts: Sequence[Sequence[int]]
    params: Sequence[SamplingParams]
    outputs: list[RequestOutput] = field(default_factory=list)
    error: BaseException | None = None
    taken: bool = False


class Server:
    """Runs one `flexmoe.LLM` for many threads. It can be stopped and started as often as one likes."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.serving = False
        self._turn = threading.Lock()  # whoever holds it computes
        self._waiting: list[_Job] = []
        self._guard = threading.Lock()  # of _waiting

    def start_server(self) -> None:
        """Serve. Scripts of 2023 never say so: `run` starts it too."""
        self.serving = True

    def stop_server(self) -> None:
        """Wait for what is being computed, then stop. Nothing happens if it does not serve."""
        with self._turn:
            self.serving = False

    def run(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Complete prompts of token ids, together with those of other threads."""
        job = _Job(prompts, params)
        with self._guard:
            self._waiting.append(job)
        with self._turn:
            self.serving = True
            if not job.taken:
                self._compute(self._take())
        if job.error is not None:
            raise job.error
        return job.outputs

    def close(self) -> None:
        """Stop and free the model."""
        with self._turn:
            self.serving = False
            self.llm.close()

    def _take(self) -> list[_Job]:
        with self._guard:
            jobs, self._waiting = self._waiting, []
        for job in jobs:
            job.taken = True
        return jobs

    def _compute(self, jobs: Sequence[_Job]) -> None:
        """One call of the engine for all. If one of several is refused, each gets its own answer or error."""
        try:
            outputs = self.llm.generate(
                [p for job in jobs for p in job.prompts], [s for job in jobs for s in job.params]
            )
        except Exception as error:  # noqa: BLE001  (it is raised in the thread whose job it is)
            if len(jobs) == 1:
                jobs[0].error = error
            else:
                for job in jobs:
                    self._compute([job])
        except BaseException:
            for job in jobs:  # the threads of the others must not wait for ever
                job.error = EngineError("the thread that computed this request was interrupted; ask again.")
            raise
        else:
            for job in jobs:
                job.outputs, outputs = outputs[: len(job.prompts)], outputs[len(job.prompts) :]
