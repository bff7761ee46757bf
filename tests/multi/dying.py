"""A rank that ends or hangs as the environment says: FLEXMOE_TEST_FATE="phase rank how".

phase: load, prefill, decode or close. how: kill (SIGKILL, in the midst of collectives), exit (code 3), raise (a Python
error), refuse (an error on purpose, once), stop (SIGSTOP: it hangs), sleep (it hangs, but its process shows life),
abort (SIGABRT, as gloo ends on messages of the wrong size).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from flexmoe.engine import worker as workers
from flexmoe.engine.wire import WireParts
from flexmoe.engine.worker import ChildWorker
from flexmoe.errors import EngineError
from flexmoe.parallel.comm import Traffic
from flexmoe.parallel.rank import main

_COLLECTIVES_BEFORE = 3


class Doomed(Traffic):
    """Meets its fate at one of the next collectives."""

    left = -1
    how = ""

    def count(self, label: str, num_bytes: float) -> None:
        self.left -= 1
        if self.left == -1:
            meet(self.how)


def meet(how: str) -> None:
    sys.stderr.write("these are the last words\n")
    if how == "raise":
        raise MemoryError("no more")
    if how == "refuse":
        raise EngineError("the memory of device 'cuda:0' ran out.")
    if how == "sleep":
        time.sleep(600)
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "abort": signal.SIGABRT}[how])


class DyingWorker(ChildWorker):
    """A Worker with a fate."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        phase, rank, self._how = os.environ["FLEXMOE_TEST_FATE"].split()
        self._phase = phase if int(rank) == self.setup.rank else ""
        if self._phase == "load":
            self._load = workers.start
            workers.start = lambda *_: meet(self._how)  # type: ignore[assignment, return-value]

    def step(self, wires: WireParts) -> Any:
        decodes = all(wire.num_decodes == len(wire.chunks) for wire in wires.parts)
        if self._phase == ("decode" if decodes else "prefill"):
            assert self.runner is not None
            assert self.mesh is not None
            parts = [value for module in self.runner.model.modules() for value in vars(module).values()]
            for part in (*parts, self.mesh.pp, self.mesh.dp):
                if hasattr(part, "traffic"):
                    part.traffic = Doomed(beats=self._beats)
                    part.traffic.left, part.traffic.how = 0, self._how
            self._phase = ""
        return super().step(wires)

    def close(self) -> None:
        if self._phase == "close":
            meet(self._how)
        super().close()


def run() -> None:
    main(DyingWorker, sys.argv[1:])
