"""`calibrate --dry-run`: it checks what a run checks, reads headers only, and needs no torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import estimate, run, settings
from tests.cli.standins import in_python
from tests.layerwise.chats import FIXTURES, words, write_chats

MODEL = "qwen3_moe"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, estimate):
        monkeypatch.setattr(module, "missing_packages", lambda: ["torch", "transformers"])


def printed(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, object]:
    capsys.readouterr()
    assert main([*line, "--dry-run", "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def test_without_torch_each_sample_is_as_long_as_it_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without_torch: None
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    found = printed(capsys, *words(MODEL, chats, tmp_path / "scores.pt", "--samples", "6"))
    assert (found["samples"], found["tokens"], found["drawn"]) == (6, 6 * 48, False)
    assert "torch, transformers, not installed here" in str(found["notes"])
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]
    shares = printed(capsys, "calibrate", str(FIXTURES / MODEL), "--share", "2/3")
    assert (shares["samples"], shares["tokens"]) == (171, 171 * 2048)


def test_nothing_heavy_is_imported_and_no_weight_is_read(tmp_path: Path) -> None:
    model = Path(shutil.copytree(FIXTURES / MODEL, tmp_path / "model"))
    for shard in model.glob("*.safetensors"):
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        size = shard.stat().st_size
        with shard.open("r+b") as file:
            file.truncate(header)
            file.truncate(size)
    code = (
        "import sys; from shardsurgeon.cli.main import main;"
        "sys.modules.update(dict.fromkeys(['torch', 'transformers', 'psutil', 'greenlet']));"
        "assert main(['calibrate', sys.argv[1], '--dry-run', '-q']) == 0;"
        "assert 'datasets' not in sys.modules"
    )
    done = in_python(code, str(model), capture_output=True, check=True)
    assert "Dry run: nothing was written." in done.stdout
    if sys.platform == "linux":
        assert "a layer's experts stay, ready" in done.stdout or "in groups of" in done.stdout


@pytest.mark.torch
def test_with_transformers_samples_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = write_chats(tmp_path / "chats.jsonl")
    line = words(MODEL, chats, tmp_path / "scores.npz", "--samples", "6", "--max-length", "99")
    found = printed(capsys, *line)
    assert found["drawn"] and 6 < found["tokens"] < 6 * 99  # type: ignore[operator]
    assert not (tmp_path / "scores.npz").exists()
    assert main(line) == 0
    assert printed(capsys, *line)["tokens"] == found["tokens"]
    capsys.readouterr()
    assert main([*line, "--seed", "7", "--dry-run"]) == 2
    assert "exists and holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-length", "50000"], "50,000 tokens are longer than the 40,960 that qwen3_moe"),
        (["--share", "1/600"], "--share: 1/600 of 512 samples leaves some shares empty"),
        (["--dtype", "int8"], "--dtype: 'int8' is none of"),
        (["--memory", "much"], "--memory: 'much' is not a size"),
        (["--memory", "100kB"], "one layer takes"),
        (["--extend", "none.pt"], "none.pt"),
    ],
)
def test_what_a_run_would_refuse_is_refused(
    capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(["calibrate", str(FIXTURES / MODEL), "--dry-run", *more]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_packages_that_are_looked_for_are_those_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "_NEEDED", ("json", "no_such_package"))
    assert settings.missing_packages() == ["no_such_package"]
