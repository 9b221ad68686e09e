"""How the processes of one calibration find each other, and what they talk through.

A child of this process has two pipes. The ranks that torchrun starts meet at the store that torch
keeps for them: rank 0 leaves the path of a socket there, in a folder that only its user may enter,
and the others call it. From then on both are a `Channel`.

torch is imported only where ranks meet: the command line asks here whether it is one of them.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from shardsurgeon.errors import UsageError, WorkError
from shardsurgeon.storage.phases import phase
from shardsurgeon.storage.system import is_strangers
from shardsurgeon.storage.threads import WAKE_SECONDS

# One rank may have to import torch from a slow disk.
_MEETING_SECONDS = 30 * 60.0
# What a rank says first: its number.
_NUMBER = struct.Struct("!I")
_meetings = itertools.count()


class Channel:
    """Messages to and from one other process: anything that can be pickled.

    Both ends are processes of one user, who started both: a message is trusted as code is. Sending
    is for any thread, receiving for one.
    """

    def __init__(
        self, reader: BinaryIO, writer: BinaryIO, hang_up: Callable[[], object] = lambda: None
    ) -> None:
        """reader, writer: buffered; hang_up: ends a `receive` that is under way elsewhere."""
        self._reader = reader
        self._writer = writer
        self._hang_up = hang_up
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Send a message; to an end that is gone, nothing: whoever receives is told of that."""
        data = pickle.dumps(message)
        with self._sending, suppress(OSError, ValueError):
            self._writer.write(data)
            self._writer.flush()

    def receive(self) -> object:
        """Wait for the next message. Raises EOFError where the other end is gone."""
        try:
            return pickle.load(self._reader)
        except (OSError, ValueError, pickle.UnpicklingError) as error:  # gone amid a message
            raise EOFError from error

    def close(self) -> None:
        """Hang up; the other end is told."""
        with suppress(OSError):
            self._hang_up()
        for file in (self._writer, self._reader):
            with suppress(OSError, ValueError):
                file.close()


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of the processes this is that torchrun started together.

    number: from 0; count: of all; here: of those on this machine.
    """

    number: int
    count: int
    here: int


def this_rank() -> Rank | None:
    """Which rank this process is by its environment, None where it works alone."""
    try:
        number, count, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        rank = Rank(number, count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    except (KeyError, ValueError):
        return None
    meets = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return rank if rank.count > 1 and meets else None


def follows() -> bool:
    """Whether this process is a rank that leaves it to rank 0 to say how it went."""
    rank = this_rank()
    return rank is not None and rank.number > 0


@contextmanager
def met(rank: Rank) -> Iterator[list[Channel]]:
    """For the time of a `with`, the channels: of rank 0 to ranks 1, 2, …, of another to rank 0.

    Raises UsageError where the ranks are on several machines or the system has no sockets in
    folders, WorkError where one does not come.
    """
    if rank.here != rank.count:
        problem = f"starts {rank.count} processes, {rank.here} of them on this machine"
        remedy = "start them on one; of several, each takes a --share, to be merged"
        raise UsageError("torchrun", problem, remedy)
    if not hasattr(socket, "AF_UNIX"):
        problem = "needs sockets that lie in a folder, which this system has not"
        raise UsageError("torchrun", problem, "leave it out: --device cuda takes all devices")
    with ExitStack() as open_until_end:
        with phase("waiting for the other ranks"):
            call = _called if rank.number == 0 else _call
            connections = call(rank, time.monotonic() + _MEETING_SECONDS, open_until_end)
        channels = []
        for connection in connections:
            hang_up = partial(connection.shutdown, socket.SHUT_RDWR)
            reader, writer = connection.makefile("rb"), connection.makefile("wb")
            channels.append(Channel(reader, writer, hang_up))
            open_until_end.callback(channels[-1].close)
        yield channels


def _called(rank: Rank, end: float, closing: ExitStack) -> list[socket.socket]:
    """The connections to ranks 1, 2, …, which `closing` closes; end: of the wait for them."""
    store = _store()
    came: dict[int, socket.socket] = {}
    # Nobody else may enter it: what comes through a channel is trusted.
    with TemporaryDirectory(prefix="ranks-") as folder, socket.socket(socket.AF_UNIX) as server:
        place = os.path.join(folder, "0")
        server.bind(place)
        server.listen(rank.count)
        server.settimeout(WAKE_SECONDS)
        store.set(_key(), place)
        while len(came) + 1 < rank.count:
            if time.monotonic() >= end:
                raise _nobody(f"{rank.count - 1 - len(came)} of {rank.count} ranks")
            with suppress(TimeoutError):
                connection = closing.enter_context(server.accept()[0])
                with connection.makefile("rb", buffering=0) as file:
                    came[_NUMBER.unpack(file.read(_NUMBER.size))[0]] = connection
    return [connection for _, connection in sorted(came.items())]


def _call(rank: Rank, end: float, closing: ExitStack) -> list[socket.socket]:
    """The connection to rank 0."""
    store, key = _store(), _key()
    # A wait inside of torch would not be ended by a signal.
    while not store.check([key]):
        if time.monotonic() >= end:
            raise _nobody("rank 0")
        time.sleep(WAKE_SECONDS)
    place = store.get(key).decode()
    if is_strangers(os.lstat(os.path.dirname(place))):
        raise UsageError("torchrun", f"{place} belongs to another user", "choose another port")
    connection = closing.enter_context(socket.socket(socket.AF_UNIX))
    connection.connect(place)
    connection.sendall(_NUMBER.pack(rank.number))
    return [connection]


def _store() -> Any:
    """The store where ranks meet, as MASTER_ADDR and MASTER_PORT name it."""
    from torch.distributed import rendezvous

    # A process group would do no more, and needs a host name that resolves.
    return next(rendezvous("env://", timeout=timedelta(seconds=_MEETING_SECONDS)))[0]


def _key() -> str:
    """Another for each meeting: a program may calibrate more than once."""
    return f"shardsurgeon/{next(_meetings)}"


def _nobody(who: str) -> WorkError:
    problem = f"{who} did not come within {_MEETING_SECONDS / 60:.0f} minutes"
    return WorkError("torchrun", problem, "look at what torchrun says of them, and run it again")
