"""`scores from-router`: words handed on, a table for people, one document for machines."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from shardsurgeon.cli.scores import from_router_command
from shardsurgeon.routerscores import RouterNorm
from tests.cli.standins import SCORED, FakeOperations, Run

WORDS = ("scores", "from-router", "-o", "scores.safetensors")


def test_the_words_are_handed_on(run: Run, fake: FakeOperations) -> None:
    run(*WORDS)
    run("scores", "from-router", "/models/K2", "--norm", "l1", "-o", "scores.json")
    assert fake.calls == [
        ((None, "scores.safetensors"), {"norm": "l2"}),
        (("/models/K2", "scores.json"), {"norm": "l1"}),
    ]


def test_the_norms_offered_are_those_there_are() -> None:
    (choice,) = (p.type for p in from_router_command.params if p.name == "norm")
    assert set(choice.choices) == set(RouterNorm)  # type: ignore[attr-defined]


def test_the_report_reads_well(run: Run) -> None:
    assert run(*WORDS).stdout == (
        "GLM-4.5: router_l2 of 160 experts in 2 routers\n"
        "\n"
        "  layer  lowest  median  highest\n"
        "  -----  ------  ------  -------\n"
        "      1     0.5    0.75     1.25\n"
        "    92*  0.0625   0.125       10\n"
        "  * next-token-prediction layer\n"
        "\n"
        "Scores saved in scores.safetensors.\n"
    )


def test_json_is_the_report(run: Run) -> None:
    document = json.loads(run(*WORDS, "--json").stdout)
    assert document == json.loads(json.dumps(asdict(SCORED)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("scores", "from-router"), "'-o'"),
        ((*WORDS, "--norm", "l3"), "'l2', 'l1'"),
        (("scores", "form-router"), "'form-router'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, words: tuple[str, ...], told: str) -> None:
    ended = run(*words)
    assert ended.status == 2
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
