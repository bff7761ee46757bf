"""This machine on the way to others. Enters: where they are. Leaves: its address and interface, sockets that notice."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge

# A machine that is lost closes no connection: after so many seconds without its acknowledgements one counts as broken.
_IDLE_SECONDS, _PROBES = 2, 2
KEY_SECONDS = 5.0  # to prove that one knows a key
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def own_address(host: str, port: int) -> str:
    """This machine's address on the way to host:port, which other machines on that side can reach, too."""
    with socket.create_connection((host, port)) as way:
        address: str = way.getsockname()[0]
    return address


def is_loopback(host: str) -> bool:
    """Whether a name or address stands for the machine that says it."""
    return host == "localhost" or host.startswith("127.")


def interface_to(host: str, port: int) -> str | None:
    """The interface through which this machine reaches host:port; None if that cannot be told.

    Nor can it if a host by another name turns out to be this machine itself: others reach that through a real one.
    """
    address = own_address(host, port)
    if is_loopback(address) and not is_loopback(host):
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == address), None)


def accept(listener: Listener, key: bytes) -> Connection:
    """A connection of whoever knows the key. Others that find the port are turned away, also those that say nothing.

    listener: without a key of its own, with which it would wait for these for ever.
    """
    while True:
        connection = listener.accept()
        timer = threading.Timer(KEY_SECONDS, shut_down, [connection])
        timer.start()
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
        else:
            return connection
        finally:
            timer.cancel()


def watch_peer(connection: Connection) -> None:
    """Let a connection over a network break soon after the other machine is lost."""
    with _socket_of(connection) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        settings = {
            "TCP_KEEPIDLE": _IDLE_SECONDS, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": _PROBES,
            "TCP_USER_TIMEOUT": 1000 * (_IDLE_SECONDS + _PROBES),
        }  # fmt: skip
        for name, value in settings.items():
            if hasattr(socket, name):  # not every system lets one choose
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def shut_down(connection: Connection) -> None:
    """End a connection for whoever reads from it, on both sides; a thread of ours may be one of them."""
    with _socket_of(connection) as end:
        end.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: Connection) -> socket.socket:
    """Another handle of the same socket, to be closed by itself."""
    return socket.socket(fileno=os.dup(connection.fileno()))


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none, or the system is another
            return None
    return socket.inet_ntoa(answer[20:24])
