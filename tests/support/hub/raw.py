"""Servers that break the rules of HTTP itself, which no framework would send."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

# Given the head of a request: what is sent, piece by piece; the connection ends with the last.
Answer = Callable[[str], Iterable[bytes]]


@contextmanager
def raw_server(answer: Answer, *, unasked: bool = False) -> Iterator[str]:
    """The address of a server that answers every request so, for the time of a `with`.

    unasked: it does not wait for the request.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while not unasked and b"\r\n\r\n" not in head:
                data = connection.recv(65536)
                if not data:
                    return
                head += data
            for piece in answer(head.decode("latin-1")):
                if ended.is_set():
                    return
                connection.sendall(piece)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        # Wakes the one that waits in accept.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def drip(data: bytes, seconds: float = 0.05) -> Iterator[bytes]:
    """Byte by byte."""
    for byte in data:
        yield bytes([byte])
        time.sleep(seconds)


def for_ever(piece: bytes, seconds: float = 0.0) -> Iterator[bytes]:
    """The same again and again."""
    while True:
        yield piece
        time.sleep(seconds)


def head(status: str = "200 OK", **headers: object) -> bytes:
    """The head of an answer; underscores in names are hyphens."""
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
