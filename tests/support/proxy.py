"""A way to a PostgreSQL server that loses what passes, at a message of the tests' choice."""

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from typing import Self

_HEADER = struct.Struct("!I")
_ENCRYPTION_REQUESTS = (80_877_103, 80_877_104)  # they come before the message that starts up
_CHUNK_BYTES = 65_536
_ABRUPTLY = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets


class Do(Enum):
    """What becomes of a message on its way to the server."""

    FORWARD = "forward"
    CUT_BEFORE = "cut before"
    """The connection is lost, and the message with it."""
    CUT_AFTER = "cut after"
    """The server gets the message, and the client no answer."""


Choice = Callable[[bytes, bytes], Do]
"""From a message's type, empty for the first of a connection, and its content."""


def forward(kind: bytes, content: bytes) -> Do:
    return Do.FORWARD


def lose(how: Do, which: Callable[[int], bool]) -> Choice:
    """Cut at the commits of batches whose number, from 1, is chosen."""
    numbers, entered, parsed = itertools.count(1), False, False

    def choose(kind: bytes, content: bytes) -> Do:
        nonlocal entered, parsed
        if kind in (b"Q", b"P"):
            entered |= b"INTO ingest_batches" in content
            if entered and b"COMMIT" in content:  # a new connection has commits of its own
                entered = False
                if not which(next(numbers)):
                    return Do.FORWARD
                if kind == b"Q" or how is Do.CUT_BEFORE:
                    return how
                parsed = True  # it is under way when the server is told to synchronise
        elif kind == b"S" and parsed:
            parsed = False
            return how
        return Do.FORWARD

    return choose


class Proxy:
    """Listens on a port of 127.0.0.1 and passes messages on to a server's Unix socket.

    Attributes:
        choose: What becomes of each message of a client.
        refusing: Whether new connections are reset at once.
        cuts: Connections that were cut at a message.
    """

    def __init__(self, upstream: str) -> None:
        self.choose: Choice = forward
        self.refusing = False
        self.cuts = 0
        self._upstream = upstream
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._run(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.refusing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def url(self, database: str) -> str:
        """The database's URL through here; nothing is encrypted, so messages can be read."""
        port = self._listener.getsockname()[1]
        query = "sslmode=disable&gssencmode=disable"
        return f"postgresql://postgres@127.0.0.1:{port}/{database}?{query}"

    def cut(self) -> None:
        """Lose every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()

    def refuse(self) -> None:
        """Lose every connection, and take no more until `admit`."""
        self.refusing = True
        self.cut()

    def admit(self) -> None:
        self.refusing = False

    def _run(self, body: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=body, args=args, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            link = _Link(client)
            with self._lock:
                self._links.add(link)
            if self.refusing or not link.connect(self._upstream):
                link.cut()
                self._forget(link)
                continue
            self._run(self._to_server, link)
            self._run(self._to_client, link)

    def _to_server(self, link: "_Link") -> None:
        with suppress(OSError):
            for kind, message in link.messages():
                todo = self.choose(kind, message[len(kind) + _HEADER.size :])
                link.is_deaf |= todo is not Do.FORWARD  # first, for the server may be quick
                if todo is not Do.CUT_BEFORE:
                    link.server.sendall(message)
                if todo is not Do.FORWARD:
                    self.cuts += 1
                    link.cut()
                    return
        link.end(link.server)

    def _to_client(self, link: "_Link") -> None:
        with suppress(OSError):
            while data := link.server.recv(_CHUNK_BYTES):
                if not link.is_deaf:  # else what the server says is lost
                    link.client.sendall(data)
        link.cut()
        self._forget(link)

    def _forget(self, link: "_Link") -> None:
        with self._lock:
            self._links.discard(link)
        link.close()


class _Link:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.server = socket.socket(socket.AF_UNIX)
        self._lock = threading.Lock()
        self._is_cut = False
        self.is_deaf = False

    def connect(self, upstream: str) -> bool:
        try:
            self.server.connect(upstream)
        except OSError:
            return False
        return True

    def messages(self) -> Iterator[tuple[bytes, bytes]]:
        """Each message of the client: its type, and the whole of it."""
        starting = True
        while True:
            kind = b"" if starting else self._read(1)
            header = self._read(_HEADER.size)
            rest = self._read(_HEADER.unpack(header)[0] - _HEADER.size)
            if starting:
                starting = _HEADER.unpack(rest[: _HEADER.size])[0] in _ENCRYPTION_REQUESTS
            yield kind, kind + header + rest

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.client.recv(min(size - len(data), _CHUNK_BYTES))
            if not part:
                raise ConnectionError("the client is gone")
            data += part
        return bytes(data)

    def end(self, side: socket.socket) -> None:
        with suppress(OSError):
            side.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Reset the client; the server reads what it was sent, and then the end."""
        with self._lock:
            if self._is_cut:
                return
            self._is_cut = self.is_deaf = True
            with suppress(OSError):
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABRUPTLY)
                self.client.shutdown(socket.SHUT_RDWR)
            self.end(self.server)

    def close(self) -> None:
        self.client.close()
        self.server.close()
