"""`flexmoe serve` as a process. Enters: its arguments. Leaves: its address, its log, its memory, its exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil

_START_SECONDS = 300.0
_COMMAND = (sys.executable, "-m", "flexmoe", "serve", "--port", "0")


class ServerProcess:
    """Started on a free port; a context manager that ends it."""

    def __init__(self, *arguments: str, command: Sequence[str] = _COMMAND) -> None:
        """command: what starts a server that speaks like `flexmoe serve`."""
        self._process = subprocess.Popen([*command, *arguments], stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []  # a dictionary for each line of JSON
        self.url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(_START_SECONDS) or not self.url:
            self._process.kill()
            raise SystemExit("the server did not start.")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def stop(self) -> int:
        """SIGTERM; the exit status, once the log is read to its end."""
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(120)
        self._reader.join(10)
        return status

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if line.startswith("Serving at "):
                    self.url = line.split()[2]
                    self._ready.set()
                elif line.startswith("{"):
                    self.log.append(json.loads(line))
        self._ready.set()
