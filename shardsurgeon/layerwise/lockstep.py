"""Several computations that wait for one another at the same places.

For `passing`: every batch of a chunk runs through a layer up to its experts, then each expert is
read once and serves them all, then the batches go on. Each computation has a thread, so that it
can be left in the middle of the model's own code; only one of them runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

Task = Callable[[Callable[[Any], Any]], None]
"""A computation. It is given `meet`, which takes a request and gives its answer."""
Serve = Callable[[list[Any]], list[Any]]
"""Requests of all computations that wait → their answers, in the same order."""


def run_in_lockstep(tasks: Sequence[Task], serve: Serve) -> None:
    """Run all tasks to their end, in turns; whenever all of them wait, serve their requests.

    What a task or `serve` raises stops all of them and is raised here.
    """
    if len(tasks) == 1:
        # No need to leave it in the middle.
        tasks[0](lambda request: serve([request])[0])
        return
    runners = [_Runner(task) for task in tasks]
    try:
        for runner in runners:
            runner.step(None)
        while waiting := [runner for runner in runners if runner.waits]:
            answers = serve([runner.request for runner in waiting])
            for runner in waiting:
                runner.request = None
            for position, runner in enumerate(waiting):
                answer, answers[position] = answers[position], None
                runner.step(answer)
    finally:
        for runner in runners:
            runner.abandon()


class _Abandoned(BaseException):
    """Unwinds a task that will not be answered."""


class _Runner:
    """One task in its thread; runs only between a call of `step` and its return."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._turn = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._answer: Any = None
        self._failure: BaseException | None = None
        self._stop = False
        self.request: Any = None
        self.waits = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self, answer: Any) -> None:
        """Let it run, with the answer it waits for, until it waits again or has ended."""
        self._answer, self.waits = answer, False
        del answer
        self._turn.release()
        self._done.acquire()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """End it where it stands, and wait for that."""
        self._stop = True
        self._turn.release()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stop:
                self._task(self._meet)
        except _Abandoned:
            pass
        except BaseException as error:
            self._failure = error
        finally:
            self._done.release()

    def _meet(self, request: Any) -> Any:
        self.request, self.waits = request, True
        del request
        self._done.release()
        self._turn.acquire()
        if self._stop:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer
