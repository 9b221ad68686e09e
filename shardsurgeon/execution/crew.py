"""Threads that share a run's tasks: each takes one after the other until there are none.

`execution` gives them the shards' tasks and then the small files'.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from shardsurgeon.execution.progress import Meter, Stopped

Tool = TypeVar("Tool")


def run_tasks(
    tasks: Iterator[Callable[[Tool], None]],
    make_tool: Callable[[], Tool],
    workers: int,
    meter: Meter,
) -> None:
    """Do the tasks, in about the order they come, and return when all are done.

    make_tool: makes what a worker keeps for all its tasks. Only one worker at a time waits for
    the next task. Raises the first error that any worker met, or that stopped the meter.
    """
    taking = threading.Lock()

    def work() -> None:
        try:
            tool = make_tool()
            while True:
                with taking:
                    task = next(tasks, None)
                if task is None:
                    return
                task(tool)
        except Stopped:
            pass
        except BaseException as error:  # raised again below
            meter.stop(error)

    with ThreadPoolExecutor(workers, "shardsurgeon") as pool:
        try:
            crew = [pool.submit(work) for _ in range(workers)]
            # Woken now and then, because on Windows Ctrl-C does not end a wait.
            while wait(crew, timeout=0.2).not_done:
                pass
        except BaseException:
            meter.stop()
            raise
    if meter.error is not None:
        raise meter.error
