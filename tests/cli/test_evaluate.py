"""`evaluate` as it is typed and as it reports; the operation is a stand-in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shardsurgeon.layerwise.damage import Accepted
from shardsurgeon.layerwise.request import CalibrationRequest
from shardsurgeon.layerwise.settings import Settings
from shardsurgeon.operations.evaluate import Prune, candidates
from shardsurgeon.pruning.request import Allocation, Lists, SelectionRequest
from tests.cli.standins import EVALUATED, FakeOperations, Run, candidate

LEAST = ("evaluate", "--ratio", "0.5", "--dataset", "chats.jsonl", "-o", "e.json")
ONE_PART = replace(
    EVALUATED,
    original_parts=EVALUATED.original_parts[:1],
    candidates=tuple(
        replace(candidate(name, kept, kl, None), parts=EVALUATED.candidates[0].parts[:1])
        for name, kept, kl in (("0.5", 192, 0.5), ("0.65", 135, 1.0))
    ),
)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_report_reads_well(run: Run, fake: FakeOperations) -> None:
    fake.evaluate = ONE_PART
    assert run(*LEAST).stdout == (
        "Kimi-K2.5: 2 candidates on code.jsonl:256,chat.jsonl:256\n"
        "\n"
        "                                  KL   KL   KL  same first\n"
        "            perplexity  change  mean  p95  p99      choice\n"
        "  --------  ----------  ------  ----  ---  ---  ----------\n"
        "  original           8       -     -    -    -           -\n"
        "       0.5         8.5   +6.2%   0.5    2    4       75.0%\n"
        "      0.65           9  +12.5%     1    4    8       75.0%\n"
        "\n"
        "  KL: in nats, of a candidate from the model, per token; 0 where they say the same\n"
        "\n"
        "  predicted     65,536 tokens of 512 samples\n"
        "  computed      in bfloat16 on cuda, 4096.0 s\n"
        "  note          a note\n"
        "\n"
        "Evaluation saved in evaluation.json.\n"
    )


def test_every_part_has_a_table_and_the_worst_is_named(run: Run) -> None:
    said = run(*LEAST).stdout
    assert said.count("perplexity  change") == 3
    assert "  code.jsonl: 256 samples\n" in said and "  chat.jsonl: 256 samples\n" in said
    assert "  0.65          is worst on chat.jsonl\n" in said


def test_layers_are_shown_where_they_are_asked_for(run: Run) -> None:
    said = run(*LEAST, "--layers").stdout
    assert said.count("weight lost") == 2
    assert "      0     0.125  0.9922            -\n" in said
    assert "      1      0.25  0.9688        37.5%\n" in said
    assert "weight lost" not in run(*LEAST).stdout


def test_answers_that_were_forced_have_a_column(run: Run, fake: FakeOperations) -> None:
    forced = Accepted(40, 12.5, 9.0, 80.25, 0.125)
    (found, _) = ONE_PART.candidates
    fake.evaluate = replace(
        ONE_PART,
        original=replace(ONE_PART.original, accepted=forced),
        candidates=(replace(found, damage=replace(found.damage, accepted=forced)),),
    )
    said = run(*LEAST).stdout
    assert "accepted\n" in said and said.count("12.5 of 80.2\n") == 2


def test_json_is_the_report(run: Run) -> None:
    document = json.loads(run(*LEAST, "--json").stdout)
    assert document == EVALUATED.to_dict()
    assert document["candidates"][1]["worst_part"] == "chat.jsonl"


def test_words_become_prunes_and_a_request(run: Run, fake: FakeOperations) -> None:
    assert run(*LEAST).status == 0
    ((model, scores, prunes, request, out), options) = fake.calls[0]
    assert (model, scores, out) == (None, None, "e.json")
    assert prunes == [Prune("0.5", SelectionRequest(ratio=0.5))]
    assert request == CalibrationRequest("chats.jsonl", Settings())
    said = " ".join(("shardsurgeon", *LEAST))
    assert options == {"family": None, "restart": False, "force": False, "command": said}
    words = "model scores.pt --keep 8 --plan a.json --plan b/c.json --samples 8 --max-length 16"
    words += " --seed 7 --device cuda:1 --dtype float32 --batch-size 4 --memory 40GB"
    words += " --activation-budget 16GB --field body --restart --force --tokenizer t"
    words += " --trust-remote-code --family auto --tokens assistant --skip-invalid"
    assert run(*LEAST, *words.split()).status == 0
    ((model, scores, prunes, request, _), options) = fake.calls[1]
    assert (model, scores) == ("model", "scores.pt")
    assert [prune.name for prune in prunes] == ["0.5", "keep 8", "a", "c"]
    assert request == CalibrationRequest(
        "chats.jsonl",
        Settings(device="cuda:1", dtype="float32", batch_size=4, seed=7),
        samples=8,
        max_length=16,
        activation_budget=16 * 10**9,
        field="body",
        tokenizer="t",
        trust_remote_code=True,
        skip_invalid=True,
        tokens="assistant",
        memory=40 * 10**9,
    )
    assert options.items() >= {"family": "auto", "restart": True, "force": True}.items()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (None, None)),
        (("scores.pt",), (None, "scores.pt")),
        (("org/model",), ("org/model", None)),
        (("org/model", "scores.pt"), ("org/model", "scores.pt")),
        (("scores.pt", "--model", "m"), ("m", "scores.pt")),
        (("gone.pt", "--model", "m"), ("m", "gone.pt")),
    ],
)
def test_a_single_word_is_the_scores_where_it_is_a_file(
    run: Run, fake: FakeOperations, words: tuple[str, ...], expected: tuple[str | None, ...]
) -> None:
    Path("scores.pt").touch()
    assert run(*LEAST, *words).status == 0
    assert fake.calls[0][0][:2] == expected


def test_the_variable_for_the_model_gives_way_to_words(
    run: Run, fake: FakeOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDSURGEON_MODEL", "/models/K2")
    Path("scores.pt").touch()
    for words in (("scores.pt",), ("/models/K3", "scores.pt"), ("/models/K3",)):
        assert run(*LEAST, *words).status == 0
    found = [args[:2] for args, _ in fake.calls]
    assert found == [
        ("/models/K2", "scores.pt"),
        ("/models/K3", "scores.pt"),
        ("/models/K3", None),
    ]


def test_three_words_are_too_many(run: Run, fake: FakeOperations) -> None:
    ended = run(*LEAST, "model", "a.pt", "b.pt")
    assert ended.status == 2 and "extra argument (b.pt)" in ended.stderr
    assert fake.calls == []


def test_candidates_are_named_by_what_tells_them_apart() -> None:
    found = candidates([0.25, 0.5], None, [], ["reap", "man"], Allocation.GLOBAL)
    assert [prune.name for prune in found] == [
        *("0.25 reap global", "0.5 reap global", "0.25 man global", "0.5 man global")
    ]
    assert found[2].request == SelectionRequest(
        ratio=0.25, metric="man", allocate=Allocation.GLOBAL
    )
    (alone,) = candidates([], 8, [], ["man"], Allocation.UNIFORM)
    assert alone == Prune("keep 8", SelectionRequest(keep=8, metric="man"))
    alike = candidates([], None, [Path("a/plan.json"), "b/plan.json"], [], Allocation.UNIFORM)
    assert [prune.name for prune in alike] == ["a/plan.json", "b/plan.json"]


def test_what_lists_are_is_said_of_keep_lists_or_of_rankings() -> None:
    def asked(lists: Lists) -> list[Lists | None]:
        found = candidates([0.5], None, ["plan.json"], [], Allocation.UNIFORM, lists)
        return [prune.request.lists for prune in found]

    assert asked(Lists.DROPPED) == [None, Lists.DROPPED]
    assert asked(Lists.WORST_FIRST) == [Lists.WORST_FIRST, None]
