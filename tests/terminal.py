"""A program at a pseudo-terminal, for tests of what people type and see."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType

import psutil

TIMEOUT = 60.0


class Terminal:
    """Starts a program whose input and output are a terminal of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        self._screen, inner = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self._process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(inner)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._screen)

    def type(self, text: str) -> None:
        """Keys pressed."""
        os.write(self._screen, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C: the terminal makes a signal of it."""
        self.type("\x03")

    def wait_for(self, *texts: str) -> str:
        """Read until all the texts have appeared in this order; returns what was read."""
        deadline = time.monotonic() + TIMEOUT
        while (end := _end_of(self._unread, texts)) is None:
            assert time.monotonic() < deadline, f"{texts} did not appear in {self._unread!r}"
            self._read(1.0)
        text, self._unread = self._unread[:end], self._unread[end:]
        return text

    def wait_for_more(self) -> None:
        """Read until something new appears beside what was typed, which the terminal echoes first."""
        self.wait_for("\n")
        deadline = time.monotonic() + TIMEOUT
        while not self._unread.strip() and time.monotonic() < deadline:
            self._read(0.05)

    def wait_until_idle(self) -> None:
        """The program waits for a key, or for something else that does not come."""
        process, idle, before = psutil.Process(self._process.pid), 0, None
        deadline = time.monotonic() + TIMEOUT
        while idle < 5:
            assert time.monotonic() < deadline, "the program works on and on"
            time.sleep(0.02)
            now = process.cpu_times()
            idle = idle + 1 if process.status() == psutil.STATUS_SLEEPING and now == before else 0
            before = now

    def exit_status(self) -> int:
        """Wait for the end."""
        deadline = time.monotonic() + TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            self._read(0.1)
        return self._process.wait(timeout=1)

    def _read(self, seconds: float) -> None:
        if select.select([self._screen], [], [], seconds)[0]:
            try:
                self._unread += os.read(self._screen, 65536).decode(errors="replace")
            except OSError:  # Linux's way of saying that the program closed the terminal
                time.sleep(0.05)


def _take_terminal() -> None:
    """In the child: make the terminal on standard input its controlling one, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _end_of(text: str, texts: Sequence[str]) -> int | None:
    at = 0
    for wanted in texts:
        at = text.find(wanted, at)
        if at < 0:
            return None
        at += len(wanted)
    return at
