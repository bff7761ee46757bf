"""The life of a server: socket, model, serving, drain, end. Enters: options. Leaves: an exit status.

SIGTERM or SIGINT: no new requests; those that run may finish within drain_seconds, then the status is 0. The same
again: the end at once. If the engine dies, requests in flight are answered with an error, and the status is 1; so it is
if it hangs when the end has come.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn

from flexmoe.config.server import ServerConfig, usual_chunk_rate
from flexmoe.engine.async_engine import AsyncEngine
from flexmoe.engine.collector import leave_out
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError, EngineError
from flexmoe.planned import make_engine
from flexmoe.server.app import build_app
from flexmoe.server.connection import patient_protocol, room_for_connections
from flexmoe.server.logs import JSONFormatter
from flexmoe.server.rivals import rival_of
from flexmoe.server.service import Service

_log = logging.getLogger("flexmoe.server")

# How long a thread may hold the interpreter before another gets it. With Python's 5 ms the engine, back from a step,
# would wait for the event loop longer than the step took.
_SWITCH_SECONDS = 0.0005
# That a step may take, by device: many tokens on a slow CPU, or on a GPU a step whose kernels are all to be compiled.
_STEP_SECONDS = {"cpu": 1800.0}
# Until streams that were told to end have said so to their clients.
_LAST_WORDS_SECONDS = 3.0


def serve(options: Mapping[str, Any], config: ServerConfig, announce: Callable[[Service, str], None]) -> int:
    """Serve until a signal or the engine's death. announce: called with the URL, once requests are taken.

    Raises ConfigError if the address cannot be had, and what the engine raises at its start.
    """
    with listening(config) as listener:
        engine = make_engine(options)
        _start_log()
        sys.setswitchinterval(_SWITCH_SECONDS)
        server = Server(engine, config, listener, announce)
        leave_out()
        server.run(sockets=[listener])
    status = 1 if server.died or server.hung else 0
    if server.left:  # a thread in a step that does not end would hold up the interpreter's own end
        sys.stderr.flush()
        os._exit(status)
    return status


class Server(uvicorn.Server):
    """uvicorn with our signals, our drain and our log."""

    def __init__(
        self, engine: Engine, config: ServerConfig, listener: socket.socket, announce: Callable[[Service, str], None]
    ) -> None:
        device, most_seconds = engine.describe()["device"], config.step_seconds
        self._engine = AsyncEngine(
            engine,
            expert_interval=config.expert_interval,
            max_output_rate=config.max_chunk_rate or usual_chunk_rate(device),
            step_seconds=_STEP_SECONDS.get(device, 300.0) if most_seconds is None else most_seconds,
            on_death=self._on_death,
        )
        self.service = Service(self._engine, config)
        self.service.compare = rival_of(config, engine)
        self._drain_seconds, self._url, self._announce = config.drain_seconds, _url(listener), announce
        self._drain: asyncio.Task[None] | None = None
        self._told = self.died = False  # told: by a signal, to end
        self.hung = self.left = False  # when the end had come. left: in a step that may go on
        super().__init__(
            uvicorn.Config(
                build_app(self.service),
                http=patient_protocol(config.receive_seconds, room_for_connections()),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(_LAST_WORDS_SECONDS),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn in the event loop."""
        self._engine.start()
        await super().startup(sockets)
        self._announce(self.service, self._url)
        _log.info("serving", extra={"fields": {"url": self._url, **self.service.about}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once should_exit is set: doors are closed, what runs may finish."""
        self.service.draining = True
        for door in self.servers:
            door.close()
        in_flight = self._engine.num_streams
        if not self.died:
            _log.info("draining", extra={"fields": {"in_flight": in_flight, "seconds": self._drain_seconds}})
            await self._engine.drain(self._drain_seconds)
        await super().shutdown(sockets)
        if self.service.compare is not None:
            await self.service.compare.close()
        self.hung = self._engine.hang is not None
        self.left = not await self._engine.close()
        engine = "dead" if self.died else "hung" if self.hung else "left in a step" if self.left else "closed"
        _log.info("ended", extra={"fields": {"engine": engine}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain; uvicorn's own way would end the process by the signal, not with 0."""
        if self._told:
            os.write(2, b"stopped at once, by a second signal\n")
            os._exit(128 + sig)
        self._told = self.should_exit = True

    def _on_death(self, error: EngineError) -> None:
        self.died = self.should_exit = True


@contextlib.contextmanager
def listening(config: ServerConfig) -> Any:
    """The address, taken before minutes are spent on a model. Nobody can connect before uvicorn listens."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"host={config.host!r}, port={config.port}: the address cannot be had ({error.strerror}); "
                "use another --port, or an address of this machine as --host."
            ) from error
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _start_log() -> None:
    """Ours and uvicorn's, as lines of JSON on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for name, level in (("flexmoe", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
