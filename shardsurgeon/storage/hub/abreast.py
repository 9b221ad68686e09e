"""Several large files on their way at once, and none of them in the way of whoever wants to leave.

A call that waits for the network cannot be ended. So it is made on threads that the program does
not wait for: what they had sent is found again by the next run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")

# More connections do not fill a link better; Xet has several of its own for each file.
UPLOADS_AT_ONCE = 4
# How often, in seconds, who waits looks up: on Windows Ctrl-C does not end a wait.
_LOOK_UP = 0.2


def abreast(
    send: Callable[[str, Path], _Result], files: Mapping[str, Path], at_once: int = UPLOADS_AT_ONCE
) -> dict[str, _Result]:
    """What `send` gives for every file, by name. Raises the first error that it meets."""
    waiting = iter(files.items())
    taking, done = threading.Lock(), dict[str, _Result]()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with taking:
                    name, path = next(waiting, (None, None))
                if name is None or path is None:
                    return
                done[name] = send(name, path)
        except BaseException as error:  # raised again below
            errors.append(error)

    threads = [
        threading.Thread(target=work, name="shardsurgeon-upload", daemon=True)
        for _ in range(min(at_once, len(files)))
    ]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            for thread in threads:
                thread.join(_LOOK_UP)
    except BaseException as stop:
        errors.append(stop)  # no further file is begun
        raise
    if errors:
        raise errors[0]
    return {name: done[name] for name in files}
