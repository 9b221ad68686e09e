"""`fit`: what is asked of the operation, what people read, and the companions of `plan --gpus`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from shardsurgeon.cli.fit import thinned
from shardsurgeon.errors import FamilyError
from shardsurgeon.pruning.machines import FitRequest, parse_machines
from tests.cli.standins import FITTED, ROOM, FakeOperations, Run


def asked(fake: FakeOperations) -> FitRequest:
    request = fake.calls[-1][0][1]
    assert isinstance(request, FitRequest)
    return request


def test_it_asks_for_the_usual_machines(run: Run, fake: FakeOperations) -> None:
    assert run("fit").status == 0
    assert fake.calls == [((None, FitRequest()), {"scores": None, "family": None})]


def test_every_option_reaches_the_operation(run: Run, fake: FakeOperations) -> None:
    words = ["fit", "/models/K2", "scores.pt", "--gpus", "8x80GB,2x141GB", "--context", "128k"]
    words += ["--sequences", "4", "--kv-dtype", "fp8", "--tensor-parallel", "2"]
    assert run(*words, "--expert-parallel", "--mtp-layers").status == 0
    ((model, request), options) = fake.calls[-1]
    assert (model, options["scores"]) == ("/models/K2", "scores.pt")
    assert request == FitRequest(
        machines=parse_machines("8x80GB,2x141GB"),
        context=131_072,
        sequences=4,
        kv_dtype="fp8",
        tensor_parallel=2,
        expert_parallel=True,
        mtp=True,
    )


def test_the_usual_machines_are_one_table(run: Run) -> None:
    lines = run("fit").stdout.splitlines()
    assert lines[0] == FITTED.title
    (row,) = (line.split() for line in lines if "4x80GB" in line)
    assert row == ["4x80GB", "112", "56.2%", "61.2", "GB", "9.8", "GB", "571,000", "34,900"]
    assert any("70.3 kB per token, 2.3 GB per sequence of 32,768 tokens" in line for line in lines)


def test_named_machines_have_a_line_per_count(run: Run, fake: FakeOperations) -> None:
    fake.fit = replace(FITTED, usual=False)
    lines = run("fit", "--gpus", "4x80GB").stdout.splitlines()
    assert "4x80GB: 84.2 GB per GPU, 4 ranks" in lines
    rows = [line.split() for line in lines if line.endswith(("yes", "no"))]
    assert [(row[0], row[-1]) for row in rows] == [("112", "yes"), ("120", "no")]
    assert any("a note" in line for line in lines)
    assert any("--tensor-parallel-size 4 --max-model-len 32768" in line for line in lines)


def test_a_machine_that_no_engine_runs_has_its_reason(run: Run, fake: FakeOperations) -> None:
    machine = replace(FITTED.machines[0], rows=(), kept=None, problem="3 heads are odd")
    fake.fit = replace(FITTED, machines=(machine,))
    assert "4x80GB: 3 heads are odd" in run("fit").stdout


def test_the_document_has_every_row(run: Run) -> None:
    document = json.loads(run("fit", "--json").stdout)
    assert [row["kept"] for row in document["machines"][0]["rows"]] == [112, 120]
    assert document["machines"][0]["rows"][0]["longest_context"] == 34_900
    assert document["assumptions"]


def test_of_many_counts_the_best_and_its_neighbours_are_shown() -> None:
    rows = tuple(replace(ROOM, kept=kept) for kept in range(8, 392, 8))
    shown = [row.kept for row in thinned(rows, 112)]
    assert {8, 104, 112, 120, 384} <= set(shown) and len(shown) <= 12
    assert shown == sorted(shown)
    assert thinned(rows[:5], None) == list(rows[:5])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus", "8x80"), "--gpus: '8x80' is no machine; write it like 8x80GB"),
        (("--context", "long"), "--context: 'long' is not a number of tokens"),
        (("--context", "0"), "--context: '0' is not a number of tokens"),
        (("--sequences", "0"), "--sequences: 0 is less than 1"),
        (("--tensor-parallel", "0"), "--tensor-parallel: 0 is less than 1"),
    ],
)
def test_words_that_cannot_be_meant_are_one_line(
    run: Run, words: tuple[str, ...], says: str
) -> None:
    ended = run("fit", *words)
    assert ended.status == 2
    assert f"error: {says}" in ended.stderr


def test_unknown_attention_is_one_line(run: Run, fake: FakeOperations) -> None:
    fake.fit = FamilyError("config.json", "unknown attention: nobody read it")
    ended = run("fit")
    assert (ended.status, ended.stdout) == (2, "")
    assert "config.json: unknown attention: nobody read it" in ended.stderr


# plan and apply


def test_plan_hands_the_machines_and_how_they_serve_on(run: Run, fake: FakeOperations) -> None:
    words = ("plan", "s.pt", "--ratio", "0.5,0.6", "--gpus", "4x80GB", "--context", "64k")
    assert run(*words).status == 0
    for args, options in fake.calls:
        assert options["gpus"] == FitRequest(machines=parse_machines("4x80GB"), context=65_536)
        assert args[2].fit is None


@pytest.mark.parametrize("command", [("plan",), ("apply", "--dry-run")])
def test_fit_is_a_selection(run: Run, fake: FakeOperations, command: tuple[str, ...]) -> None:
    words = (*command, "s.pt", "--fit", "8x80GB", "--sequences", "2")
    assert run(*words).status == 0
    requests: list[Any] = [arg for args, _ in fake.calls for arg in args if hasattr(arg, "fit")]
    wanted = FitRequest(machines=parse_machines("8x80GB"), sequences=2)
    assert requests and all(request.fit == wanted for request in requests)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ratio", "0.5", "--context", "64k"), "--context: is about GPUs, and none are named"),
        (("--ratio", "0.5", "--fit", "8x80GB"), "2 selections at once (--ratio, --fit)"),
        (("--fit", "8x80GB,4x80GB"), "--fit: names 2 machines"),
        (("--fit", "8x80GB", "--multiple-of", "4"), "--multiple-of: counts that fit"),
        ((), "give one of --ratio, --keep, --target-size, --fit, --plan"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    run: Run, words: tuple[str, ...], says: str
) -> None:
    ended = run("plan", "s.pt", *words)
    assert ended.status == 2 and says in ended.stderr


def test_several_plans_have_a_column_per_machine(run: Run, fake: FakeOperations) -> None:
    from tests.cli.standins import PLANNED

    one = replace(FITTED.machines[0], rows=(ROOM,))
    fake.plan = replace(PLANNED, fits=(one, replace(one, machine="2x24GB", rows=(), problem="odd")))
    text = run("plan", "s.pt", "--ratio", "0.5,0.6", "--gpus", "4x80GB,2x24GB").stdout
    assert "narrowest" not in text
    assert "571,000" in text and "under a machine: tokens of KV cache left" in text
    assert "2x24GB: odd" in text and "Assumed:" in text
    alone = run("plan", "s.pt", "--ratio", "0.5", "--gpus", "4x80GB,2x24GB").stdout
    assert "571,000 tokens of KV cache left: fits" in " ".join(alone.split())
