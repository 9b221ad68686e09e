"""Every command that writes a file which the user names: what becomes of what stands there."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.scores.files import write_scores
from tests.cli.test_refusals import ROOT, digest
from tests.layerwise.files import calibration

# The command without -o, in a folder that has a model and score files; what it writes, and the
# inputs that are of the same kind.
SCORES = {
    "convert": (["convert", "one.npz"], ["one.npz"]),
    "convert --model": (["convert", "one.npz", "--model", "model"], ["one.npz"]),
    "merge": (["merge", "one.npz", "two.npz"], ["one.npz", "two.npz"]),
    "blend": (
        ["blend", "one.npz", "two.npz", "--weights", "one=2,two=1"],
        ["one.npz", "two.npz"],
    ),
    "from-router": (["from-router", "model"], []),
    "from-weights": (["from-weights", "model"], []),
    "random": (["random", "model"], []),
}
COMMANDS = {
    "plan": (["plan", "scores.pt", "--model", "model", "--ratio", "0.5"], "plan.json", []),
    "plan --plan": (["plan", "--plan", "old.json", "--model", "model"], "plan.json", ["old.json"]),
    **{name: (["scores", *words], "out.npz", inputs) for name, (words, inputs) in SCORES.items()},
}
EVERY = pytest.mark.parametrize("name", COMMANDS)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="no devices and pipes by path")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "fixtures" / "qwen3_moe", "model")
    for number, name in enumerate(("one.npz", "two.npz"), start=1):
        write_scores(name, calibration(number).content())
    shutil.copy("model/scores.pt", "scores.pt")
    plan = ["plan", "scores.pt", "--model", "model", "--keep", "8", "-o", "old.json"]
    assert main(plan) == 0
    return tmp_path


def run(name: str, out: str, *more: str) -> int:
    return main([*COMMANDS[name][0], "-o", out, *more])


def refused(capsys: pytest.CaptureFixture[str], name: str, out: str, *more: str) -> str:
    """The one line of a refusal, which changes nothing."""
    before = digest(Path())
    capsys.readouterr()
    assert run(name, out, *more) == 2
    ended = capsys.readouterr()
    assert ended.err.count("\n") == 1 and not ended.out
    assert digest(Path()) == before
    return ended.err


@EVERY
def test_a_command_whose_result_is_there_is_done(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = COMMANDS[name][1]
    assert run(name, out) == 0
    before, stamp = digest(Path()), Path(out).stat().st_mtime_ns
    capsys.readouterr()
    assert run(name, out) == run(name, out, "--force") == 0
    assert capsys.readouterr().out.count("already") == 2
    assert (digest(Path()), Path(out).stat().st_mtime_ns) == (before, stamp)


@EVERY
def test_a_result_of_its_kind_is_replaced_by_force_only(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = COMMANDS[name][1]
    assert run(name, f"wanted{Path(out).suffix}") == 0
    wanted = Path(f"wanted{Path(out).suffix}").read_bytes()
    if out == "plan.json":
        assert main(["plan", "scores.pt", "--model", "model", "--keep", "10", "-o", out]) == 0
    else:
        assert main(["scores", "random", "model", "--seed", "9", "-o", out]) == 0
    assert "exists and holds something else; choose another -o, or replace a" in refused(
        capsys, name, out
    )
    assert run(name, out, "--force") == 0
    assert Path(out).read_bytes() == wanted


@EVERY
@pytest.mark.parametrize("more", [(), ("--force",)])
def test_any_other_file_stays(
    name: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = COMMANDS[name][1]
    Path(out).write_bytes(b"mine")
    assert "exists and holds something else; choose another -o" in refused(capsys, name, out, *more)
    Path(out).unlink()
    Path(out).mkdir()
    assert "is no file that can be written" in refused(capsys, name, out, *more)


@EVERY
def test_an_input_is_never_an_output(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in COMMANDS[name][2]:
        Path(f"link{Path(file).suffix}").symlink_to(file)
        for spelling in (file, f"model/../{file}", f"link{Path(file).suffix}"):
            assert "is read by this command" in refused(capsys, name, spelling, "--force")
        Path(f"link{Path(file).suffix}").unlink()
    for file in (Path("model/config.json"), Path("model/model-00001-of-00003.safetensors")):
        if name.startswith("plan") or file.suffix == ".safetensors":
            refused(capsys, name, str(file), "--force")


@EVERY
@POSIX
def test_a_pipe_and_a_device_are_written_into(name: str) -> None:
    out = COMMANDS[name][1]
    assert run(name, f"wanted{Path(out).suffix}") == 0
    os.mkfifo(out)
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(Path(out).read_bytes)
        assert run(name, out) == 0
        assert came.result(timeout=60) == Path(f"wanted{Path(out).suffix}").read_bytes()
    assert Path(out).is_fifo()
    Path(f"null{Path(out).suffix}").symlink_to("/dev/null")
    assert run(name, f"null{Path(out).suffix}") == 0
    assert Path("/dev/null").is_char_device() and Path(f"null{Path(out).suffix}").is_symlink()


@EVERY
def test_what_lies_there_under_the_name_of_a_temporary_file_stays(name: str) -> None:
    out = COMMANDS[name][1]
    Path("precious").write_bytes(b"mine")
    Path(f"{out}.writing").symlink_to("precious")
    Path(f".{out}.writing").symlink_to("precious")
    before = set(os.listdir())
    assert run(name, out) == 0
    assert Path("precious").read_bytes() == b"mine"
    assert set(os.listdir()) == before | {out}


@EVERY
@pytest.mark.parametrize("out", ["", "s3://bucket/out.json", "file:///out.npz"])
def test_a_name_that_is_none_is_refused(
    name: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, name, out)
    assert ("-o: is given an empty word" if not out else "is an address") in line


# `apply`: its output is a folder.


APPLY = ["apply", "scores.pt", "--model", "model", "--keep", "8", "-o"]


def test_apply_is_done_where_its_result_is_there_and_refuses_any_other_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*APPLY, "out"]) == 0
    before = digest(Path())
    capsys.readouterr()
    assert main([*APPLY, "out"]) == main([*APPLY, "out", "--dry-run"]) == 0
    assert "all of it by an earlier run" in capsys.readouterr().out
    assert main(["scores", "random", "model", "-o", "other.npz"]) == 0
    before = digest(Path())
    assert main(["apply", "other.npz", "--model", "model", "--keep", "8", "-o", "out"]) == 2
    assert main([*APPLY, "out", "--mtp", "drop", "--max-shard-size", "200kB"]) == 2
    assert capsys.readouterr().err.count("out: exists and holds something else") == 2
    assert digest(Path()) == before


def test_apply_finds_a_result_that_was_spoiled_since(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*APPLY, "out"]) == 0
    shard = Path("out/model-00002-of-00003.safetensors")
    raw = bytearray(shard.read_bytes())
    for at in range(len(raw) // 2, len(raw)):
        raw[at] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    assert main([*APPLY, "out"]) == 1
    assert "differs from what it was made of" in capsys.readouterr().err


def test_apply_makes_nothing_where_its_work_would_be_the_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("model").rename("out.partial")
    before = digest(Path())
    for more in ((), ("--restart",)):
        words = ["apply", "scores.pt", "--model", "out.partial", "--keep", "8", "-o", "out", *more]
        assert main(words) == 2
        assert "out.partial: is the source itself" in capsys.readouterr().err
    assert digest(Path()) == before
