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
    ("fit", "q/scores.pt", "q"): "q/scores.pt: is a file, where MODEL is a folder; did you mean q "
    "q/scores.pt?",
    ("evaluate", "q/scores.pt", "q", "--ratio", "0.5", "--dataset", "d.txt", "-o", "e.json"): "did "
    "you mean q q/scores.pt?",
    ("plan", "org/name", "q/scores.pt", "--keep", "8"): "did you mean --model org/name?",
    ("plan", "a.pt", "b.pt", "--keep", "8"): "Got unexpected extra argument (b.pt)",
}
WRONG_PLANS = {
    ("apply", "--plan", "q/scores.pt", "--model", "q"): "q/scores.pt: holds scores, not lists of "
    "the experts to keep; give it as SCORES, and say how many with --ratio",
    ("apply", "--plan", "plane.json", "--model", "q"): "plane.json: there is no such file; did you "
    "mean plan.json?",
    ("apply", "--plan", "q/plan.json", "--model", "q"): "`plan -o FILE` saves one",
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


def apply_half(out: str) -> None:
    assert main(["apply", "q/scores.pt", "--model", "q", "--keep", "8", "-o", out]) == 0


def test_source_and_pruned_that_are_swapped_or_the_same_are_told_apart(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply_half("small")
    swapped = "small: was made of q: SOURCE and PRUNED are swapped; name q first"
    assert said(capsys, "verify", "small", "q") == swapped
    for pruned in ("q", "./q", str(here / "q")):
        assert "is SOURCE itself" in said(capsys, "verify", "q", pruned)
    # A prune of a prune has its source first as well.
    again = ("apply", "q/scores.pt", "--model", "small", "--keep", "6", "-o", "smaller")
    assert main(again) == 0
    assert main(["verify", "small", "smaller"]) == 0
    assert "smaller: was made of small" in said(capsys, "verify", "smaller", "small")
    assert "smaller: was made of q" in said(capsys, "verify", "smaller", "q")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "work.partial"),
        ("inspect", "work.partial/files"),
        ("plan", "q/scores.pt", "--keep", "8", "--model", "work.partial"),
        ("verify", "q", "work.partial"),
        ("verify", "work.partial", "q"),
        ("materialize", "work.partial"),
        ("push", "work.partial", "me/x"),
    ],
)
def test_unfinished_work_is_no_model(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "q", here / "work.partial" / "files")
    (here / "work.partial" / "shardsurgeon.journal").write_text("{}")
    line = said(capsys, *words)
    assert "work.partial: is the unfinished work of an apply; finish it by the same" in line


@pytest.mark.parametrize("words", [("inspect", "work"), ("verify", "q", "work")])
def test_a_result_that_is_not_finished_is_said_to_be_so(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "work.partial").mkdir()
    (here / "work.partial" / "shardsurgeon.journal").write_text("{}")
    assert "work: there is no such folder; its unfinished work is in work.partial: run" in said(
        capsys, *words
    )


def test_a_partial_calibration_is_no_score_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "s.pt.partial").mkdir()
    assert "is the unfinished work of another command" in said(
        capsys, "scores", "show", "s.pt.partial"
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_a_model_stands_for_its_folder(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["inspect", "q"]) == main(["inspect", f"q/{name}"]) == 0
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]
    assert "is a file and no .safetensors file; give the folder" in said(
        capsys, "inspect", "q/tokenizer.json"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "q/scores.pt", "--model", "q", "--keep", "8"),
        ("scores", "convert", "q/scores.pt"),
        ("scores", "from-router", "q"),
        ("scores", "from-weights", "q"),
        ("scores", "random", "q"),
    ],
)
def test_a_folder_that_is_missing_for_a_file_is_named_before_any_work(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "there").mkdir()
    line = said(capsys, *words, "-o", "there/new/deep/x.json")
    there = Path("there", "new")
    assert line.endswith(f"there is no folder {there}; make it first: mkdir -p {there / 'deep'}")
    assert "plan.json is no folder" in said(capsys, *words, "-o", "plan.json/x.json")
    assert [*(here / "there").iterdir()] == []


def test_a_model_is_written_into_folders_that_are_made(here: Path) -> None:
    apply_half("new/deep/small")
    assert (here / "new" / "deep" / "small" / "config.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "~/q"),
        ("plan", "q/scores.pt", "--keep", "8", "--model", "~/q"),
        ("verify", "q", "~/q"),
        ("apply", "q/scores.pt", "--model", "q", "--keep", "8", "-o", "~/q"),
        ("plan", "q/scores.pt", "--model", "q", "--keep", "8", "-o", "~/q"),
        ("scores", "random", "q", "-o", "~/q"),
    ],
)
def test_a_home_that_no_shell_wrote_out_is_written_out_for_the_user(
    words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, *words).endswith("the shell left the ~ as it is: write /home/me/q")
    assert not (here / "~").exists()
