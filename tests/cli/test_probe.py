"""`probe`: what becomes of its options, and what it prints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardsurgeon.operations.probe import ProbeRequest
from shardsurgeon.operations.prompts import Sampling
from tests.cli.standins import PROBED, FakeOperations, Run

URL = "http://gpu:8000/v1"
WORDS = ("probe", URL, "--prompts", "chats.jsonl", "-o", "probe.json")


def test_options_become_a_request(run: Run, fake: FakeOperations) -> None:
    assert run(*WORDS).status == 0
    words = ["--samples", "50", "--against", "o.json", "--temperature", "0.6", "--top-p", "0.95"]
    words += ["--top-k", "20", "--min-p", "0.01", "--repetition-penalty", "1.1", "--seed", "7"]
    words += ["--max-tokens", "99", "--detect", "0.05", "--parallel", "3", "--timeout", "9"]
    words += [
        "--sampling",
        "min_p=0.05,top-k=5",
        "--sampling",
        "temperature=1",
        "--force",
        "--restart",
    ]
    words += ["--served-model", "a", "--api-key-env", "KEY", "--field", "said"]
    assert run(*WORDS, *words).status == 0
    plain, full = fake.calls
    kept = {"restart": False, "force": False}
    assert plain == ((URL, ProbeRequest("chats.jsonl", others=[]), "probe.json"), kept)
    request = ProbeRequest(
        "chats.jsonl",
        50,
        Sampling(0.6, 0.95, 20, 0.01, 1.1, 99),
        [{"min_p": 0.05, "top_k": 5}, {"temperature": 1}],
        "o.json",
        0.05,
        7,
        3,
        9,
        "said",
        served_model="a",
        api_key_env="KEY",
    )
    assert full == ((URL, request, "probe.json"), {"restart": True, "force": True})


def test_the_report_shows_shares_differences_and_what_is_open(run: Run) -> None:
    out = run(*WORDS).stdout
    title = "K2.5-72: 144 of 1,999 answers loop, 7.20 % [6.15 %, 8.42 %] -> probe.json"
    assert out.splitlines()[0] == title
    assert "  original      K2.5 (http://gpu:8001/v1)\n" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "loops 144 of 1,999 7.20 % [6.15 %, 8.42 %]" in lines
    assert "loops 3.60 % +3.60 [+2.21, +5.02] more" in lines
    assert "cut by length 7.50 % +0.50 [-1.16, +2.17] undecided 5,509" in lines
    assert "empty 0.05 % -0.05 [-0.28, +0.15] none of 2" in lines
    assert "loops 7.20 % -4.20 [-5.59, -2.85] fewer" in lines
    assert "refused chats.jsonl, record 7, by http://gpu:8000/v1: 400 Bad Request" in lines
    assert "undecided: a difference of 2 points (--detect) may be there or not; to tell" in lines
    assert max(map(len, out.splitlines())) <= 80
    for word in ("equal", "same", "identical", "alike"):
        assert word not in out


def test_without_an_original_nothing_is_compared(run: Run, fake: FakeOperations) -> None:
    base = PROBED.settings[0]
    alone = tuple(replace(each, to_original=None) for each in base.failures)
    fake.probe = replace(
        PROBED,
        original=None,
        settings=(replace(base, failures=alone),),
        refusals=(),
        records=2000,
        written=False,
    )
    out = run(*WORDS).stdout
    assert "-> probe.json: there already\n" in out
    assert "compared" not in out and "undecided" not in out and "independent" not in out
    assert out.endswith("Answers saved in probe.answers.jsonl, beside probe.json.\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sampling", "min_p"), "--sampling: 'min_p' is not NAME=NUMBER; write it like"),
        (("--sampling", "min_p=1,min-p=.5"), "--sampling: min_p stands there twice; say it once"),
        (("--sampling", "min_p=a,top_k=1"), "--sampling: 'min_p=a' is not NAME=NUMBER"),
        (("--temperature", "-1"), "--temperature: -1 cannot be; give 0 or more"),
        (("--top-p", "0"), "--top-p: 0 cannot be; give above 0 and at most 1"),
        (("--top-k", "0"), "--top-k: 0 cannot be; give 1 or more, or -1 for all tokens"),
        (("--max-tokens", "0"), "--max-tokens: 0 cannot be; give 1 or more"),
        (("--repetition-penalty", "nan"), "--repetition-penalty: nan cannot be"),
        (("--detect", "5"), "--detect: 5 is not between 0 and 1"),
        (("--samples", "0"), "--samples: 0 is less than 1"),
        (("--against-model", "a"), "--against-model: is for a server"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    run: Run, fake: FakeOperations, words: tuple[str, ...], says: str
) -> None:
    ended = run(*WORDS, *words)
    assert (ended.status, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"shardsurgeon: error: {says}")
    assert fake.calls == []
