"""`verify`: holds or does not, in words, JSON and status."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.cli.standins import VERIFIED, FakeOperations, Run

VERIFY = ("verify", "/models/Kimi-K2.5", "/models/Kimi-K2.5-REAP-65pct")
ALL = replace(VERIFIED, sampled=None, tensors_compared=74_210, bytes_compared=237_600_000_000)
BROKEN = replace(ALL, differences=("a.weight: differs at byte 7", "b.weight: is missing"))


def test_the_words_reach_the_operation(run: Run, fake: FakeOperations) -> None:
    run(*VERIFY, "--sample", "3")
    assert fake.calls == [
        (("/models/Kimi-K2.5", "/models/Kimi-K2.5-REAP-65pct"), {"sample": 3, "progress": None})
    ]


def test_a_proof_that_holds_is_status_0(run: Run, fake: FakeOperations) -> None:
    fake.verify = ALL
    ended = run(*VERIFY)
    assert ended.status == 0
    assert ended.stderr == ""
    assert ended.stdout == (
        "/models/Kimi-K2.5-REAP-65pct: holds\n"
        "\n"
        "  source        /models/Kimi-K2.5\n"
        "  structure     74,210 tensors, index, config, side files, metadata\n"
        "  bytes         237.6 GB of 74,210 tensors (all)\n"
    )


def test_a_sample_is_called_one(run: Run) -> None:
    assert (
        "  bytes         1.5 GB of 512 tensors (a sample of 8 per shard)\n" in run(*VERIFY).stdout
    )


def test_differences_are_printed_and_end_with_status_1(run: Run, fake: FakeOperations) -> None:
    fake.verify = BROKEN
    ended = run(*VERIFY)
    assert ended.status == 1
    assert ended.stdout.startswith("/models/Kimi-K2.5-REAP-65pct: does not hold\n")
    assert ended.stdout.endswith("\n  a.weight: differs at byte 7\n  b.weight: is missing\n")
    expected = "/models/Kimi-K2.5-REAP-65pct: 2 differences from /models/Kimi-K2.5; see the report"
    assert ended.stderr == f"shardsurgeon: error: {expected}\n"


def test_differences_as_json_are_the_report_and_status_1(run: Run, fake: FakeOperations) -> None:
    fake.verify = BROKEN
    ended = run(*VERIFY, "--json")
    assert ended.status == 1
    assert json.loads(ended.stdout)["differences"] == list(BROKEN.differences)


@pytest.mark.parametrize("sample", ["0", "-3"])
def test_a_sample_of_nothing_is_refused(run: Run, fake: FakeOperations, sample: str) -> None:
    ended = run(*VERIFY, "--sample", sample)
    assert ended.status == 2
    assert f"--sample: {sample} is less than 1" in ended.stderr
    assert fake.calls == []


def test_the_bar_is_in_bytes(run: Run, fake: FakeOperations) -> None:
    def work(*folders: str, sample: int | None, progress: Callable[[int, int], None]) -> object:
        progress(0, 10**9)
        progress(10**9, 10**9)
        return ALL

    fake.verify = work
    assert "1.00G/1.00G [" in run(*VERIFY, "--progress").stderr
