"""A recipe that begins with a calibration: what it leaves, and what its copy gives again."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from tests.layerwise.chats import FIXTURES, write_chats

pytest.importorskip("torch")

RECIPE = """\
model = "model"

[calibrate]
dataset = "data/chats.jsonl:4"
max-length = 16
pack = true
tokens = "all"
skip-invalid = true
out = "scores.npz"

[apply]
ratio = 0.5
out = "small"
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_calibration_and_prune_in_one_command_and_again_from_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / "qwen3_moe", tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_chats(tmp_path / "data" / "chats.jsonl")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "recipe.toml"]) == 0
    first = contents(tmp_path / "small")
    said = tomllib.loads(first["calibration/recipe.toml"].decode())
    assert said["calibrate"]["dataset"] == "chats.jsonl:4"
    assert said["calibrate"]["pack"] is said["calibrate"]["skip-invalid"] is True
    assert said["sha256"].keys() == {"config.json", "chats.jsonl", "scores.npz"}
    assert str(tmp_path).encode() not in b"".join(first.values())

    # What is done is not done again: the same command, and the copy beside its scores.
    assert main(["run", "recipe.toml"]) == 0
    assert contents(tmp_path / "small") == first
    capsys.readouterr()
    assert main(["run", "small/calibration/recipe.toml", "--model", "model", "-o", "again"]) == 0
    assert "Scores saved" not in capsys.readouterr().out
    assert contents(tmp_path / "again") == first

    # Without the scores, from the data: the same choice, so the same weights.
    shutil.copytree(tmp_path / "data", tmp_path / "bare")
    shutil.copy(tmp_path / "small/calibration/recipe.toml", tmp_path / "bare")
    assert main(["run", "bare/recipe.toml", "--model", "model", "-o", "anew"]) == 0
    anew = contents(tmp_path / "anew")
    assert {name for name in first if name.endswith(".safetensors")} and anew == first
