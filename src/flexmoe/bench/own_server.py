"""A `flexmoe serve` of its own process, for as long as it is measured. Enters: a Subject. Leaves: its address."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from flexmoe.bench.subject import Subject
from flexmoe.errors import EngineError

_READY_SECONDS, _STOP_SECONDS = 300.0, 60.0
_ADDRESS = "Serving at "
_LAST_LINES = 5


def why_not(subject: Subject) -> str | None:
    """What keeps this model from being served here; None if nothing does."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("aiohttp") is None:
        return "serving needs more packages: pip install 'flexmoe[server,bench]'"
    if not (subject.folder / "tokenizer.json").is_file():
        return f"{subject.label} has no tokenizer, so it cannot be served"
    return None


@contextlib.contextmanager
def own_server(subject: Subject, options: Sequence[str]) -> Iterator[str]:
    """The URL of a server on any free port; it is ended with the context. options: further words of the command.

    Raises EngineError with what it said last if it does not start.
    """
    command = [sys.executable, "-m", "flexmoe", "serve", str(subject.folder), "--port", "0", *options]
    command += ["--load-format", subject.load_format]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(_READY_SECONDS, process.kill)
        watchdog.start()
        try:
            url = _address(process)
            watchdog.cancel()
            # Its log is read to the end, so that it never waits for a full pipe.
            threading.Thread(target=_drain, args=(process,), daemon=True).start()
            yield url
        finally:
            watchdog.cancel()
            _end(process)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    last: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
    for line in process.stderr:
        if line.startswith(_ADDRESS):
            return line.split()[2]
        last.append(line.strip())
    raise EngineError(f"the server did not start: {' / '.join(last) or 'it said nothing'}.")


def _drain(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for _ in process.stderr:
        pass


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
