"""Tasks that wait for one another: answered together, one running at a time, stopped together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from shardsurgeon.layerwise.forward import run_interleaved

RequestExperts = Callable[[Any], Any]


def test_requests_of_all_tasks_are_answered_together() -> None:
    rounds: list[list[Any]] = []
    results: dict[str, list[Any]] = {}

    def task(name: str, requests: int) -> Callable[[RequestExperts], None]:
        def run(request_experts: RequestExperts) -> None:
            results[name] = [request_experts((name, number)) for number in range(requests)]

        return run

    def compute(requests: list[Any]) -> list[Any]:
        rounds.append(requests)
        return [f"{name}{number}!" for name, number in requests]

    run_interleaved([task("a", 2), task("b", 1), task("c", 2)], compute)
    assert rounds == [[("a", 0), ("b", 0), ("c", 0)], [("a", 1), ("c", 1)]]
    assert results == {"a": ["a0!", "a1!"], "b": ["b0!"], "c": ["c0!", "c1!"]}


def test_two_tasks_never_run_at_the_same_time() -> None:
    running, most = 0, 0

    def task(request_experts: RequestExperts) -> None:
        nonlocal running, most
        for _ in range(3):
            running += 1
            most = max(most, running)
            running -= 1
            request_experts(None)

    run_interleaved([task] * 5, lambda requests: requests)
    assert most == 1


@pytest.mark.parametrize("number", [1, 3])
def test_an_exception_of_a_task_is_raised_and_ends_the_others(number: int) -> None:
    def good(request_experts: RequestExperts) -> None:
        request_experts(1)
        raise AssertionError("was not stopped")

    def bad(request_experts: RequestExperts) -> None:
        raise RuntimeError("broken")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="broken"):
        run_interleaved([*[good] * (number - 1), bad], lambda requests: requests)
    assert threading.active_count() == before


def test_an_exception_of_the_answer_is_raised_and_ends_all_tasks() -> None:
    def task(request_experts: RequestExperts) -> None:
        request_experts(1)
        raise AssertionError("was not stopped")

    def compute(requests: list[Any]) -> list[Any]:
        raise ValueError("cannot")

    before = threading.active_count()
    with pytest.raises(ValueError, match="cannot"):
        run_interleaved([task, task], compute)
    assert threading.active_count() == before
