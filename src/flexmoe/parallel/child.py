"""A rank's process on this machine. Enters: the module that it runs, and its connection. Leaves: a Child.

No torch here, which whoever starts ranks on another machine need not wait for.

Children are new interpreters, not multiprocessing's: a user's script needs no `if __name__` guard then, and nothing of
it runs twice.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

# Multicast over NVLink fails where a container may not use it, and from NCCL 2.29 on the whole start with it.
SAFE_ENVIRONMENT: Mapping[str, str] = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_TAIL_BYTES = 2**14


class Process(Protocol):
    """A rank's process, here or elsewhere, as its supervisor sees it."""

    @property
    def pid(self) -> int:
        """Its number on its own machine."""

    @property
    def code(self) -> int | None:
        """The exit code, -N for signal N; None while it runs, and if nobody is left who knows."""

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, after waiting so long for that."""

    def kill(self) -> None:
        """End it. When this returns it is gone, or its machine is."""

    def tail(self) -> bytes:
        """The end of its log."""

    def close(self) -> None:
        """Let go of what leads to it. May be called twice."""


class Child:
    """A process that runs `run()` of a module, with a log of its own. It ends when the one that made it does.

    The log is a file without a name: nothing of it is left when both processes are gone.
    """

    def __init__(
        self, module: str, connection: socket.socket, beats: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """connection: the child's end. beats: descriptor of the counters' file. The caller's copies may be closed.

        environment: beside this process's own.
        """
        lifeline, held = os.pipe()
        self._held: int | None = held
        paths = [path or str(Path.cwd()) for path in sys.path]
        ends = (connection.fileno(), lifeline, beats)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        weakref.finalize(self, self._log.close)  # not in close(): its end may be asked for later
        program = f"from {module} import run; run()"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-X", "faulthandler", "-c", program, *map(str, ends)],
                env={**os.environ, **SAFE_ENVIRONMENT, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                process_group=0,  # a terminal's Ctrl-C is for the driver alone
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(lifeline)
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        return self._process.poll()

    def ended(self, seconds: float = 0.0) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def tail(self) -> bytes:
        file = self._log.fileno()  # its position is the child's, too, so that it must stay
        return os.pread(file, _TAIL_BYTES, max(0, os.fstat(file).st_size - _TAIL_BYTES))

    def close(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None
