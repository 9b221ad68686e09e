"""A model that is written to while `verify` and `apply` compare it, its time put back."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.errors import SourceChangedError
from shardsurgeon.operations import api
from shardsurgeon.operations.verify import verify
from shardsurgeon.verification.byte_comparison import compare_bytes
from tests.operations.workbench import scores_of
from tests.support.hub.models import fixture_folder

FAMILY = "qwen3_moe"
SHARD = "model-00002-of-00003.safetensors"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such time")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixture_folder(FAMILY), tmp_path / "model"))


def spoil(path: Path) -> None:
    """Write over the data of a shard and put its time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        file.write(b"\xa5" * (before.st_size - file.tell()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_verify_says_that_the_source_changed_and_not_that_the_result_is_wrong(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    api.apply(api.plan(model, scores_of(FAMILY), ratio=0.5), out)
    done: list[int] = []

    def progress(nbytes: int, total: int) -> None:
        if not done:
            done.append(nbytes)
            for shard in model.glob("*.safetensors"):
                spoil(shard)

    with pytest.raises(SourceChangedError, match=r"safetensors: was touched .*; verify again"):
        verify(model, out, progress=progress)
    # A run of its own finds what it compares to differ: that the source was another is not seen.
    assert main(["verify", str(model), str(out)]) == 1
    assert ": differs" in capsys.readouterr().out


def test_apply_says_that_the_source_changed_and_names_no_bug(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*given: object, **options: object) -> object:
        spoil(model / SHARD)
        return compare_bytes(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("shardsurgeon.verification.verify.compare_bytes", compare)
    words = ["apply", str(scores_of(FAMILY)), "--model", str(model), "--ratio", "0.5"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert f"{SHARD}: was touched since the run was planned" in line
    assert "bug" not in line
    assert not (tmp_path / "out").exists()


def test_where_no_time_shows_it_the_line_still_speaks_of_the_source(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(*given: object, **options: object) -> object:
        result = tmp_path / "out.partial" / "files"
        spoil(next(result.glob("*.safetensors")))  # as if it had been copied from other bytes
        return compare_bytes(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("shardsurgeon.verification.verify.compare_bytes", compare)
    words = ["apply", str(scores_of(FAMILY)), "--model", str(model), "--ratio", "0.5"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err
    assert "differs from what it was made of" in line and "let nothing write to the source" in line
    assert "--restart" in line
