"""What an evaluation says of plans: matched by keep-lists, kept with the result, on its card."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardsurgeon
from shardsurgeon.checkpoint.recognition import EVALUATION, kind_of
from shardsurgeon.cli.main import main
from shardsurgeon.errors import InputError, OutputError, ScoreError
from shardsurgeon.operations.evaluation_report import read_evaluation
from shardsurgeon.operations.measured import measuring
from shardsurgeon.pruning.request import Allocation, Lists, Rounding, SelectionRequest
from shardsurgeon.storage import limits
from tests.cli.standins import EVALUATED
from tests.operations.test_model_card import card_of
from tests.operations.workbench import downloaded, scores_of
from tests.support.hub.models import fixture_folder
from tests.support.hub.server import LocalHub

MODEL, SCORES = fixture_folder("qwen3_moe"), scores_of("qwen3_moe")
SHA256 = hashlib.sha256((MODEL / "config.json").read_bytes()).hexdigest()
WORDS = ["plan", SCORES, "--model", str(MODEL)]


def by_hand(plan: shardsurgeon.Pruning) -> str:
    """The digest of a plan's keep-lists."""
    kept = {str(n): list(keep.retained) for n, keep in sorted(plan.decision.keep.layers.items())}
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


@pytest.fixture(scope="module")
def plans() -> list[shardsurgeon.Pruning]:
    return shardsurgeon.plan(MODEL, SCORES, ratio=[0.25, 0.5])


@pytest.fixture
def file(tmp_path: Path, plans: list[shardsurgeon.Pruning]) -> Path:
    """An evaluation of the model at two ratios, on two parts."""
    found = [
        replace(each, name=name, keep_sha256=by_hand(plan))
        for name, each, plan in zip(("0.25", "0.5"), EVALUATED.candidates, plans, strict=True)
    ]
    report = replace(
        EVALUATED, model="qwen3_moe", config_sha256=SHA256, candidates=tuple(found), notes=()
    )
    path = tmp_path / "evaluation.json"
    path.write_bytes(report.file())
    return path


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


def test_a_plan_is_told_what_was_measured_of_its_keep_lists(
    file: Path, plans: list[shardsurgeon.Pruning], tmp_path: Path
) -> None:
    plans[1].write_plan(tmp_path / "plan.json")
    half = [
        shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file),
        shardsurgeon.plan(MODEL, SCORES, keep=8, evaluation=file),
        shardsurgeon.plan(MODEL, plan_file=tmp_path / "plan.json", evaluation=str(file)),
    ]
    for plan in half:
        found = plan.report.measured
        assert found is not None
        assert (found.candidate, found.dataset) == ("0.5", EVALUATED.dataset)
        assert (found.perplexity_before, found.perplexity) == (8.0, 9.0)
        assert (found.perplexity_ratio, found.agreement) == (1.125, 0.75)
        assert (found.kl_mean, found.kl_p99, found.worst_part) == (1.0, 8.0, "chat.jsonl")
        (document,) = plan.report.to_dict()["plans"]
        assert document["measured"] == asdict(found)
    (first, second) = shardsurgeon.plan(MODEL, SCORES, ratio=[0.25, 0.5], evaluation=file)
    assert first.report.measured is not None and first.report.measured.candidate == "0.25"
    assert second.report == half[0].report
    assert plans[1].report.measured is None


def test_a_plan_that_was_not_measured_says_what_was_and_how_to(file: Path) -> None:
    plans = shardsurgeon.plan(MODEL, SCORES, ratio=[0.5, 0.75], evaluation=file)
    assert [plan.report.measured is None for plan in plans] == [False, True]
    (note,) = [note for note in plans[1].report.notes if "measured" in note]
    assert note.startswith(f"{file} measured 0.25, 0.5 and no other prune; ")
    command = f"shardsurgeon evaluate {SCORES} --model {MODEL} --ratio 0.5,0.75 --dataset DATA"
    assert f"`{command} -o evaluation.json` measures what is missing" in note
    assert not any("measured" in note for note in plans[0].report.notes)


def test_the_same_counts_of_other_experts_are_another_plan(file: Path) -> None:
    rows = [[(5 * n + layer) % 16 * 0.37 + 0.1 for n in range(16)] for layer in range(3)]
    plan = shardsurgeon.plan(MODEL, rows, keep=8, evaluation=file)
    assert plan.report.measured is None
    assert "`shardsurgeon evaluate SCORES --model" in " ".join(plan.report.notes)


def test_the_table_of_several_ratios_has_what_was_measured(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--ratio", "0.25,0.5,0.75", "--evaluation", str(file)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "                               KL   KL  same first       worst\n"
        "  ratio  perplexity  change  mean  p99      choice        part\n"
        "  -----  ----------  ------  ----  ---  ----------  ----------\n"
        "   0.25         8.5   +6.2%   0.5    4       75.0%  chat.jsonl\n"
        "    0.5           9  +12.5%     1    8       75.0%  chat.jsonl\n"
        "   0.75           -       -     -    -           -           -\n"
    ) in said
    assert "the whole model's perplexity is 8" in " ".join(said.split())
    # Lines end where they must, which depends on the length of a path.
    words_said = " ".join(said.split())
    assert words_said.count("measures what is missing") == 1 and "no accuracy" not in words_said


def test_the_outcome_of_one_plan_has_what_was_measured(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, "--ratio", "0.5", "--evaluation", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        "  perplexity    8 -> 9 (+12.5%)\n"
        "  KL            1 nats per token on average, 8 at the 99th percentile\n"
    ) in said
    assert "75.0% of first choices, measured on 65,536 tokens" in said
    assert "no accuracy" not in said and "worst on chat.jsonl" in " ".join(said.split())


def test_of_data_in_one_part_none_is_worst(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(file, lambda found: [each.update(worst_part=None) for each in found["candidates"]])
    for ratio in ("0.5", "0.25,0.5"):
        assert main([*WORDS, "--ratio", ratio, "--evaluation", str(file)]) == 0
        assert "worst\n" not in (said := capsys.readouterr().out) and "worst on" not in said


# What is no evaluation of this model


def test_an_evaluation_of_another_model_is_refused_with_both_names(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changed(file, lambda found: found.update(model="Kimi-K2.5", config_sha256="a1" * 32))
    out = tmp_path / "out"
    for words in (WORDS, ["apply", *WORDS[1:], "-o", str(out)]):
        assert main([*words, "--ratio", "0.5", "--evaluation", str(file)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{file}: is of Kimi-K2.5, whose config.json has sha256 a1a1a1a1a1a1…" in line
        assert f"that of qwen3_moe has {SHA256[:12]}…; evaluate this model" in line
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


NOT_ONE: dict[str, tuple[bytes, str]] = {
    "a config": ((MODEL / "config.json").read_bytes(), "is no evaluation; give a file of"),
    "no JSON": (b"\x80\x02cos\nsystem\n", "the evaluation"),
    "empty": (b"", "the evaluation"),
    "a list": (b"[]", "the evaluation"),
    "nested": (b'{"kind": ' + b"[" * 100_000, "the evaluation"),
    "another format": (b'{"kind": "evaluation", "format": 2}', "of format 2, 1 is known"),
    "nothing else": (b'{"kind": "evaluation", "format": 1}', "is not what an evaluation wrote"),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_what_is_no_evaluation_is_refused(name: str, tmp_path: Path) -> None:
    content, says = NOT_ONE[name]
    (tmp_path / "e.json").write_bytes(content)
    with pytest.raises(ScoreError) as caught:
        shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=tmp_path / "e.json")
    assert caught.value.where == str(tmp_path / "e.json")
    assert says in str(caught.value) and "\n" not in str(caught.value)


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "a number too large": lambda e: e["original"].update(perplexity=10**400),
    "a number as text": lambda e: e["candidates"][0]["damage"].update(kl_mean="1"),
    "true for a number": lambda e: e["candidates"][0].update(kept=True),
    "no numbers": lambda e: e["candidates"][1].update(damage=None),
    "candidates as text": lambda e: e.update(candidates="both"),
    "a part too few": lambda e: e["candidates"][0]["parts"].pop(),
    "a name as a number": lambda e: e["candidates"][0].update(name=3),
    "a digest that is missing": lambda e: e["candidates"][0].pop("keep_sha256"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_evaluation_that_was_edited_badly_is_refused(name: str, file: Path) -> None:
    with pytest.raises(ScoreError, match="is not what an evaluation wrote"):
        shardsurgeon.read_evaluation(changed(file, SPOILT[name]))


def test_an_evaluation_larger_than_any_is_not_read(file: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as out:
        out.truncate(limits.EVALUATION.nbytes + 1)
    with pytest.raises(ScoreError, match="bytes, at most"):
        shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=large)


def test_a_file_that_is_missing_is_told_what_may_be_meant(file: Path) -> None:
    with pytest.raises(ScoreError, match=r"no such file; did you mean .*evaluation\.json\?"):
        shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file.with_name("evaluatoin.json"))
    with pytest.raises(ScoreError, match=r"is a folder, not an evaluation"):
        shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file.parent)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(data=st.data())
def test_whatever_stands_in_an_evaluation_is_read_or_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    document: Any = json.loads(EVALUATED.file())
    place: Any = document
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [key for key, value in _members(place) if isinstance(value, dict | list) and value]
        if not inner:
            break
        place = place[data.draw(st.sampled_from(inner))]
    place[data.draw(st.sampled_from([key for key, _ in _members(place)]))] = data.draw(_JSON)
    path = tmp_path_factory.mktemp("spoilt") / "e.json"
    path.write_text(json.dumps(document))
    try:
        found = read_evaluation(path)
    except InputError:
        return
    assert found.title and found._repr_html_()


def _members(place: Any) -> list[tuple[Any, Any]]:
    return list(place.items() if isinstance(place, dict) else enumerate(place))


# With the result


def test_the_file_is_kept_with_the_result_and_verified(file: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file)
    report = shardsurgeon.apply(plan, out)
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5), plain)
    kept = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    others = {path.relative_to(plain).as_posix() for path in plain.rglob("*") if path.is_file()}
    assert kept - others == {"calibration/evaluation.json"}
    assert (out / "calibration" / "evaluation.json").read_bytes() == file.read_bytes()
    assert report.files == len(kept)
    verified = shardsurgeon.verify(MODEL, out)
    # The saliencies were compared with the score file, which is not the only one beside them.
    assert verified.holds and verified.notes == shardsurgeon.verify(MODEL, plain).notes
    record = json.loads((out / "calibration" / "reap_pruning_metadata.json").read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["sha256"]["calibration/evaluation.json"] == digest


def test_a_file_that_changes_before_it_is_copied_stops_the_run(file: Path, tmp_path: Path) -> None:
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file)
    file.write_bytes(file.read_bytes().replace(b"65536", b"65537"))
    with pytest.raises((InputError, shardsurgeon.WorkError), match="evaluation"):
        shardsurgeon.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keep_lists_are_never_saved_over_the_evaluation(file: Path) -> None:
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file)
    before = file.read_bytes()
    with pytest.raises(OutputError):
        plan.write_plan(file, force=True)
    assert file.read_bytes() == before


def test_the_card_prints_what_was_measured_of_this_prune(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file), out)
    text = card_of(out)
    assert "## What it costs\n" in text
    assert f"on 65,536 tokens of `{EVALUATED.dataset}`" in text
    link = "[calibration/evaluation.json](calibration/evaluation.json)"
    assert f"against the original ({link})" in text
    row = "8 | 9 (+12.5%) | 1 | 8 | 75 % |"
    for name in ("All", "`code.jsonl`", "`chat.jsonl`"):
        assert f"| {name} | {row}\n" in text


def test_what_is_pushed_says_what_it_costs_and_how_it_is_made_again(
    file: Path, tmp_path: Path, online: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file)
    shardsurgeon.apply(plan, stream_push="me/small")
    folder = downloaded(online, "me/small", tmp_path / "pushed")
    card = (folder / "README.md").read_text()
    assert "| All | 8 | 9 (+12.5%) |" in card
    (command,) = re.findall(r"^shardsurgeon (apply .+)$", card, re.MULTILINE)
    words = shlex.split(command.replace("calibration/", f"{folder}/calibration/"))
    words[words.index("--model") + 1] = str(MODEL)
    again = tmp_path / "again"
    assert main([*words, "-o", str(again)]) == 0
    pictures = {path.name for path in (folder / "calibration").glob("*.png")}
    assert pictures == {"saliency.png", "damage.png"}
    left = {path.name: path.read_bytes() for path in (again / "calibration").iterdir()}
    there = {path.name: path.read_bytes() for path in (folder / "calibration").iterdir()}
    assert left == {name: raw for name, raw in there.items() if name not in pictures}


def test_the_card_prints_nothing_of_other_prunes(file: Path, tmp_path: Path) -> None:
    other, again = tmp_path / "other", tmp_path / "again"
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.75, evaluation=file), other)
    assert "What it costs" not in card_of(other)
    half = tmp_path / "half"
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.5, evaluation=file), half)
    # Of a prune of that the first one's numbers, which it carries along, say nothing.
    shardsurgeon.apply(shardsurgeon.plan(half, SCORES, keep=4), again)
    assert (again / "calibration" / "evaluation.json").exists()
    assert "What it costs" not in card_of(again)


def test_a_chain_to_what_was_measured_in_one_go_is_known(file: Path, tmp_path: Path) -> None:
    """Keep-lists of a chain are recorded in the first model's ids."""
    first, second = tmp_path / "first", tmp_path / "second"
    shardsurgeon.apply(shardsurgeon.plan(MODEL, SCORES, ratio=0.25, evaluation=file), first)
    shardsurgeon.apply(shardsurgeon.plan(first, SCORES, keep=8), second)
    assert "| All | 8 | 9 (+12.5%) |" in card_of(second)


def test_an_evaluation_in_the_models_folder_is_left_behind(file: Path, tmp_path: Path) -> None:
    assert kind_of(file) == EVALUATION
    model = tmp_path / "model"
    model.mkdir()
    for path in MODEL.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "measured.json").write_bytes(file.read_bytes())
    report = shardsurgeon.plan(model, SCORES, ratio=0.5).report
    assert report.left_behind["measured.json"] == "evaluation"
    assert "measured.json" not in report.carried_along


def test_an_evaluation_names_no_folder_and_is_whole_when_read_again(tmp_path: Path) -> None:
    report = replace(EVALUATED, out=str(tmp_path / "secret place" / "evaluation.json"))
    assert b"secret place" not in report.file()
    (tmp_path / "e.json").write_bytes(report.file())
    assert read_evaluation(tmp_path / "e.json") == replace(EVALUATED, out="evaluation.json")


# The command that measures

DATA = ("--dataset", "DATA", "-o", "evaluation.json")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"ratio": 0.5}, ("s.pt", "--ratio", "0.5")),
        ({"ratio": 0.5, "rounding": Rounding.FLOOR}, ("s.pt", "--ratio", "0.5")),
        ({"keep": 72}, ("s.pt", "--keep", "72")),
        ({"keep": 72, "metric": "man"}, ("s.pt", "--keep", "72", "--metric", "man")),
        (
            {"ratio": 0.5, "allocate": Allocation.GLOBAL},
            ("s.pt", "--ratio", "0.5", "--allocate", "global"),
        ),
        ({"plan_file": "a.json"}, ("--plan", "a.json")),
        ({"plan_file": "a.json", "lists": Lists.DROPPED}, ("--plan", "PLAN")),
        ({"target_size": 10**9}, ("--plan", "PLAN")),
        ({"ratio": 0.5, "rounding": Rounding.CEIL}, ("--plan", "PLAN")),
        ({"ratio": 0.5, "multiple_of": 8}, ("--plan", "PLAN")),
        ({"ratio": 0.5, "preserve_super_experts": True}, ("--plan", "PLAN")),
    ],
)
def test_the_command_measures_what_was_asked_for(
    asked: dict[str, Any], words: tuple[str, ...]
) -> None:
    request = SelectionRequest(**asked)
    assert measuring(None, "s.pt", [request]) == ("shardsurgeon", "evaluate", *words, *DATA)


def test_the_command_names_model_and_family_as_they_were_given() -> None:
    requests = [SelectionRequest(ratio=ratio) for ratio in (0.25, 0.5)]
    found = measuring("org/m", "s.pt", requests, "auto")
    words = ("s.pt", "--model", "org/m", "--family", "auto", "--ratio", "0.25,0.5")
    assert found == ("shardsurgeon", "evaluate", *words, *DATA)
    opened = shardsurgeon.open_checkpoint(MODEL)
    assert measuring(opened, shardsurgeon.read_scores(SCORES), requests)[2:5] == (
        *(SCORES, "--model"),
        str(MODEL),
    )
