"""Recipes: the commands of one file, what the result keeps of it, and what that gives again."""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.cli.main import main
from shardsurgeon.errors import VerificationError
from shardsurgeon.operations import recipe, verify
from tests.cli.standins import EVALUATED, ROOT, FakeOperations, Run

APPLY = '[apply]\nscores = "data/scores.pt"\nratio = 0.5\nmax-shard-size = "200kB"\nout = "small"\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and its scores, where a recipe may lie; another one to stand in."""
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", tmp_path / "work" / "model")
    (tmp_path / "work" / "data").mkdir()
    (tmp_path / "work" / "model" / "scores.pt").rename(tmp_path / "work" / "data" / "scores.pt")
    (tmp_path / "stand").mkdir()
    monkeypatch.chdir(tmp_path / "stand")
    return tmp_path / "work"


def written(place: Path, text: str, name: str = "recipe.toml") -> str:
    (place / name).write_text(text, encoding="utf-8")
    return str(place / name)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def kept(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "calibration/recipe.toml").read_text(encoding="utf-8"))


def test_a_recipe_does_what_its_commands_do(place: Path) -> None:
    assert main(["run", written(place, f'model = "model"\n{APPLY}')]) == 0
    words = ["apply", str(place / "data/scores.pt"), "--model", str(place / "model")]
    assert main([*words, "--ratio", "0.5", "--max-shard-size", "200kB", "-o", "typed"]) == 0
    by_recipe, typed = contents(place / "small"), contents(Path("typed"))
    assert by_recipe.keys() - typed.keys() == {"calibration/recipe.toml"}
    assert {name for name in typed if typed[name] != by_recipe[name]} == {
        "calibration/reap_pruning_metadata.json"  # which lists the recipe
    }


def test_a_view_that_a_recipe_makes_becomes_what_the_recipe_makes_without(place: Path) -> None:
    text = f'model = "model"\n{APPLY}'
    assert main(["run", written(place, text)]) == 0
    text = text.replace('"small"', '"small-view"') + "view = true\n"
    assert main(["run", written(place, text, "viewed.toml")]) == 0
    assert main(["materialize", str(place / "small-view"), "-o", "made"]) == 0
    assert contents(Path("made")) == contents(place / "small")


def test_its_copy_reproduces_the_bytes_and_names_no_path(place: Path, tmp_path: Path) -> None:
    path = written(place, f'model = "{(place / "model").as_posix()}"\n{APPLY}')
    assert main(["run", path]) == 0
    elsewhere = shutil.move(place / "model", tmp_path / "moved" / "model")
    shutil.rmtree(place / "data")
    copy = place / "small" / "calibration" / "recipe.toml"
    assert main(["run", str(copy), "--model", str(elsewhere), "-o", "again"]) == 0
    assert contents(Path("again")) == contents(place / "small")
    assert str(tmp_path) not in copy.read_text() and kept(place / "small")["model"] == "model"
    assert kept(place / "small")["sha256"].keys() == {"config.json", "scores.pt"}


@pytest.mark.parametrize("said", ['"min_p=0.05,top_k=20"', '["min_p=0.05", "top_k=20"]'])
def test_sampling_settings_are_of_the_recipe_and_of_its_copy(place: Path, said: str) -> None:
    path = written(place, f'model = "model"\n{APPLY}sampling = {said}\n')
    assert main(["run", path]) == 0
    made = json.loads((place / "small" / "generation_config.json").read_bytes())
    before = json.loads((place / "model" / "generation_config.json").read_bytes())
    assert made == before | {"min_p": 0.05, "top_k": 20, "do_sample": True}
    assert kept(place / "small")["apply"]["sampling"] == json.loads(said)
    copy = str(place / "small" / "calibration" / "recipe.toml")
    assert main(["run", copy, "--model", str(place / "model"), "-o", "again"]) == 0
    assert contents(Path("again")) == contents(place / "small")


def test_an_evaluation_is_a_file_of_the_recipe(place: Path) -> None:
    digest = hashlib.sha256((place / "model" / "config.json").read_bytes()).hexdigest()
    evaluation = replace(EVALUATED, config_sha256=digest).file()
    (place / "data" / "measured.json").write_bytes(evaluation)
    ratios = '[plan]\nscores = "data/scores.pt"\nratio = [0.25, 0.5]\n'
    given = 'evaluation = "data/measured.json"\n'
    path = written(place, f'model = "model"\n{ratios}{given}{APPLY}{given}')
    assert main(["run", path]) == 0
    said = kept(place / "small")
    assert said["apply"]["evaluation"] == "evaluation.json" and "plan" not in said
    assert said["sha256"]["evaluation.json"] == hashlib.sha256(evaluation).hexdigest()
    copy = str(place / "small" / "calibration" / "recipe.toml")
    assert main(["run", copy, "--model", str(place / "model"), "-o", "again"]) == 0
    assert contents(Path("again")) == contents(place / "small")
    assert contents(Path("again"))["calibration/evaluation.json"] == evaluation


def test_a_result_made_by_a_recipe_holds_and_is_pruned_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(place, f'model = "model"\n{APPLY}')
    assert main(["run", path]) == 0
    capsys.readouterr()
    assert main(["verify", str(place / "model"), str(place / "small"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []
    again = f'model = "small"\n{APPLY}'.replace("0.5", "0.25").replace('"small"\n', '"less"\n')
    again = again.replace('model = "less"', 'model = "small"')
    assert main(["run", written(place, again, "again.toml")]) == 0
    names = {path.name for path in (place / "less/calibration").iterdir()}
    assert {"recipe.toml", "recipe-2.toml"} <= names
    assert (place / "less/calibration/recipe.toml").read_bytes() == (
        place / "small/calibration/recipe.toml"
    ).read_bytes()


def test_the_same_command_goes_on_after_an_interruption(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'model = "model"\n[plan]\nscores = "data/scores.pt"\nratio = [0.25, 0.5]\n{APPLY}'
    path = written(place, text)

    def stop(*arguments: object, **options: object) -> None:
        raise VerificationError("small", "stopped by the test")

    with monkeypatch.context() as patched:
        patched.setattr(verify, "verify_checkpoint", stop)
        assert main(["run", path]) == 1
    assert (place / "small.partial").is_dir()
    assert main(["run", path]) == 0
    assert not (place / "small.partial").exists()
    done = contents(place / "small")
    assert main(["run", path]) == 0
    assert contents(place / "small") == done


def test_apply_takes_the_keep_lists_that_plan_saves(place: Path, tmp_path: Path) -> None:
    plan = (
        '[plan]\nscores = "data/scores.pt"\nkeep = 6\nout = "plan.json"\n[apply]\nout = "small"\n'
    )
    assert main(["run", written(place, f'model = "model"\n{plan}')]) == 0
    said = kept(place / "small")
    assert said["plan"] == {"scores": "scores.pt", "keep": 6, "out": "plan.json"}
    assert said["apply"] == {}
    # The scores are not kept, and are not needed: the keep-lists lie beside the copy.
    assert not (place / "small/calibration/scores.pt").exists()
    copy = str(place / "small/calibration/recipe.toml")
    assert main(["run", copy, "--model", str(place / "model"), "-o", "again"]) == 0
    assert contents(Path("again")) == contents(place / "small")


def test_a_model_or_a_file_that_is_not_the_recorded_one_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", written(place, f'model = "model"\n{APPLY}')]) == 0
    copy = place / "small" / "calibration" / "recipe.toml"
    config = place / "model" / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    capsys.readouterr()
    assert main(["run", str(copy), "--model", str(place / "model"), "-o", "again"]) == 2
    assert "model/config.json: has sha256" in capsys.readouterr().err
    config.write_bytes(before)
    scores = copy.with_name("scores.pt")
    shutil.copy(ROOT / "fixtures" / "kimi_k2" / "scores.pt", scores)
    assert main(["run", str(copy), "--model", str(place / "model"), "-o", "again"]) == 2
    line = capsys.readouterr().err
    assert f"{scores}: has sha256" in line and "was written for" in line and line.count("\n") == 1
    assert not Path("again").exists() and not Path("again.partial").exists()


def test_two_files_of_one_name_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "scores.pt").write_bytes(b"of another folder")
    text = APPLY.replace('out = "small"\n', 'family = "scores.pt"\n')
    assert main(["run", written(place, f'model = "model"\n{text}')]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_json_is_one_document_of_all_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f'model = "model"\n[plan]\nscores = "data/scores.pt"\nratio = [0.25, 0.5]\n{APPLY}'
    assert main(["run", written(place, text), "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert list(steps) == ["plan", "apply"]
    assert len(steps["plan"]["plans"]) == 2 and steps["apply"]["out"] == str(place / "small")


STEP = '[apply]\nscores = "data/scores.pt"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no step"),
        ("ratio = 0.5", "has a part 'ratio', known are model"),
        ("apply = 3", "apply is no table"),
        ("[model]\nname = 'x'\n[apply]", "model is a table"),
        (f"model = 3\n{STEP}", "model is 3, no text"),
        (f"{STEP}ratoi = 0.5", "[apply] ratoi: is no option of apply; did you mean ratio?"),
        (f"{STEP}ratio = 0.5\nkeep = 3", "[apply]"),
        (f"{STEP}ratio = 1.5", "[apply] --ratio: 1.5 is not between 0 and 1"),
        (f"{STEP}ratio = 0.5\nverify = 'no'", "[apply] --verify: is no, and it is a question"),
        (f"{STEP}keep = true", "[apply] --keep: is True, and it is not a question"),
        (f"{STEP}keep = 1979-05-27", "[apply] keep is neither a text nor a number"),
        (f"{STEP}ratio = 0.5\njson = true", "[apply] json is of the command line"),
        ("[push]\nrepo-id = 'me/x'", "[push] has nothing to push"),
        (f"{STEP}push-to-hub = 'me/x'\n[push]\nrepo-id = 'me/x'", "and so does [push]"),
        (f"{STEP}ratio = 0.5\n[sha256]\n'scores.pt' = 3", "no SHA-256"),
        ("[calibrate]\ndataset = 'x.jsonl'", "[calibrate]"),
        ("[apply", "not TOML"),
        ("a" + ".a" * 20_000 + " = 1", "has a line of 40,005 characters"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_place(
    place: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = written(place, text)
    before = contents(place)
    assert main(["run", path, "--model", str(place / "model")]) == 2
    line = capsys.readouterr().err
    assert said in line and path in line and line.count("\n") == 1
    assert contents(place) == before and not list(Path().iterdir())


def test_a_mistake_of_the_last_step_is_told_before_the_first_begins(
    run: Run, fake: FakeOperations, place: Path
) -> None:
    first = '[calibrate]\ndataset = "x.jsonl"\nout = "s.pt"\n[apply]\n'
    ended = run("run", written(place, f"{first}ratio = 0.5\nworkers = -1\n"))
    assert ended.status == 2 and "[apply] --workers: -1 is less than 0" in ended.stderr
    ended = run("run", written(place, f"{first}ratio = 0.5\nkeep = 3\n"))
    assert ended.status == 2 and "[apply] selection: 2 selections at once" in ended.stderr
    assert fake.calls == []


def test_each_step_takes_what_the_step_before_leaves(
    run: Run, fake: FakeOperations, place: Path
) -> None:
    text = (
        'model = "model"\n[calibrate]\ndataset = "chats.jsonl:8,org/hub(train):8"\nout = "s.pt"\n'
    )
    text += '[plan]\nratio = 0.5\n[apply]\nratio = 0.5\nverify = false\n[push]\nrepo-id = "me/x"\n'
    (place / "chats.jsonl").write_text('{"text": "a"}\n')
    ended = run("run", written(place, text))
    assert (ended.status, ended.stderr) == (0, "")
    calibrated, planned, pruned, applied, pushed = fake.calls
    assert calibrated[0][0] == str(place / "model")
    assert calibrated[0][1].dataset == f"{place / 'chats.jsonl'}:8,org/hub(train):8"
    assert calibrated[0][2] == str(place / "s.pt")
    for args, _ in (planned, pruned):
        assert args[:2] == (str(place / "model"), str(place / "s.pt"))
    assert applied[0][1].verify is False
    assert pushed[0][1].repo_id == "me/x"


PLAIN = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), PLAIN | st.lists(PLAIN)))
def test_what_is_kept_is_toml_of_the_same_values(values: dict[str, Any]) -> None:
    assert tomllib.loads(recipe._toml({"": {"model": "m"}, "apply": values})) == {
        "model": "m",
        "apply": values,
    }
