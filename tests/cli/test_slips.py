"""Slips that users make, through the real command: one line that says what was meant, status 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from tests.cli.standins import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model `q`, its score file inside, and a keep-list `plan.json`."""
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "q")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    words = ("plan", "q/scores.pt", "--model", "q", "--keep", "8", "-o", "plan.json")
    assert main(words) == 0
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command ends with, without its beginning."""
    capsys.readouterr()
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.strip().removeprefix("shardsurgeon: error: ")


HALF = ("--model", "q", "--ratio", "0.5")
WRONG_SCORES = {
    ("plan", "q/scorez.pt", *HALF): "q/scorez.pt: there is no such file; did you mean q/scores.pt?",
    # In the model's folder, where the command was not typed.
    ("plan", "scores.pt", *HALF): "scores.pt: there is no such file; did you mean q/scores.pt?",
    ("scores", "show", "q/nothing.npz"): "there is no such file; did you mean q/scores.pt?",
    ("scores", "show", "nothing.npz"): "`shardsurgeon calibrate` or `shardsurgeon scores from-",
    ("scores", "compare", "q/scores.pt", "q/b.pt"): "q/b.pt: there is no such file; did you mean",
    ("plan", "~/scores.pt", *HALF): "the shell left the ~ as it is: write /home/me/scores.pt",
    ("plan", "q", *HALF): "q: is a model's folder, and SCORES is a file; give it with --model, and "
    "q/scores.pt as SCORES",
    ("plan", "q", "--ratio", "0.5"): "q: is a model's folder, and SCORES is a file",
    ("scores", "show", "q"): "q: is a model's folder, not a score file; did you mean q/scores.pt?",
    ("scores", "show", "q/config.json"): "q/config.json: is a file of a model, not scores",
    ("scores", "show", "q/model-00001-of-00003.safetensors"): "is a file of a model, not scores",
    ("plan", "plan.json", *HALF): "plan.json: is a keep-list, not scores; `plan` and `apply` take",
    ("apply", "plan.json", "--model", "q"): "plan.json: is a keep-list, not scores; give it with",
    ("scores", "show", "plan.json"): "plan.json: is a keep-list, not scores",
    ("apply", "q", "q/scores.pt", "--ratio", "0.5"): "did you mean --model q?",
    ("apply", "q/scores.pt", "q", "--ratio", "0.5"): "did you mean --model q?",
    ("plan", "org/name", "q/scores.pt", "--keep", "8"): "did you mean --model org/name?",
    ("plan", "a.pt", "b.pt", "--keep", "8"): "Got unexpected extra argument (b.pt)",
}
WRONG_PLANS = {
    ("apply", "--plan", "q/scores.pt", "--model", "q"): "q/scores.pt: holds scores, not lists of "
    "the experts to keep; give it as SCORES, and say how many with --ratio",
    ("apply", "--plan", "plane.json", "--model", "q"): "plane.json: there is no such file; did you "
    "mean plan.json?",
    ("apply", "--plan", "q/plan.json", "--model", "q"): "`shardsurgeon plan` saves one with -o",
    ("apply", "--plan", "q", "--model", "q"): "q: is a model's folder, not a keep-list",
    ("apply", "--plan", "~/p.json", "--model", "q"): "write /home/me/p.json",
}


@pytest.mark.parametrize("words", [*WRONG_SCORES, *WRONG_PLANS], ids=" ".join)
def test_another_file_in_the_place_of_scores_or_a_plan_is_called_by_its_name(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {**WRONG_SCORES, **WRONG_PLANS}[words] in said(capsys, *words)


def test_scores_in_json_are_no_keep_list_either(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s.json", "s.npz", "s.safetensors"):
        assert main(["scores", "convert", "q/scores.pt", "-o", name]) == 0
        assert "holds scores, not lists" in said(capsys, "plan", "--plan", name, "--model", "q")


def test_a_score_file_that_is_missing_is_said_before_the_model_is_read(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "q" / "config.json").write_text("{")
    assert "there is no such file" in said(capsys, "plan", "q/none.pt", *HALF)


def test_several_score_files_are_listed_and_no_other_file_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.pt", "b.pt", "c.pt", "d.pt"):
        shutil.copy(here / "q" / "scores.pt", here / name)
    (here / "vocab.json").write_text('{"a": 1}')
    (here / "weights.safetensors").write_bytes(b"\0" * 100)
    assert said(capsys, "scores", "show", "nowhere.npz").endswith(
        "score files there: a.pt, b.pt, c.pt and 1 more"
    )


def test_the_keep_list_that_a_pruned_model_carries_is_found(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply", "q/scores.pt", "--model", "q", "--keep", "8", "-o", "small"]) == 0
    record = Path("small", "calibration", "reap_pruning_metadata.json")
    line = said(capsys, "apply", "--plan", "small", "--model", "q")
    assert line == f"small: is a model's folder, not a keep-list; did you mean {record}?"
    assert "is a keep-list, not scores" in said(capsys, "plan", str(record), *HALF)
