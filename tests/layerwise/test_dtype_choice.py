"""Where no dtype is asked for, a CPU computes in what it is fast in, and every part says so."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsurgeon.cli.main import main
from shardsurgeon.errors import ScoreError
from shardsurgeon.layerwise import dtype_choice, preparation
from shardsurgeon.layerwise.calibration_file import merge, read_calibration
from shardsurgeon.layerwise.dtype_choice import (
    DtypeChoice,
    chosen_dtype,
    possible_dtypes,
    seconds_of_products,
)
from shardsurgeon.layerwise.resume import FinishedLayers
from tests.layerwise.chats import FIXTURES, words, write_chats
from tests.layerwise.files import calibration as made

MODEL = "qwen3_moe"
BOTH = ("bfloat16", "float32")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "chats.jsonl")


def timed(monkeypatch: pytest.MonkeyPatch, narrow: float, wide: float) -> list[tuple[str, ...]]:
    """Products take so long; returns what is timed, which grows."""
    calls: list[tuple[str, ...]] = []

    def seconds(dtypes: tuple[str, ...]) -> list[float]:
        calls.append(dtypes)
        return [narrow, wide]

    monkeypatch.setattr(dtype_choice, "seconds_of_products", seconds)
    return calls


def choose(folder: Path, possible: tuple[str, ...] = BOTH) -> DtypeChoice:
    """The choice of work that leaves something."""
    with chosen_dtype(possible, folder) as choice:
        (folder / "layer-00000.json").touch()
    return choice


@pytest.mark.parametrize(
    ("asked", "own", "device", "possible"),
    [
        (None, "bfloat16", "cpu", BOTH),
        (None, "float16", "cpu", ("float16", "float32")),
        (None, "float32", "cpu", ("float32",)),
        (None, "float64", "cpu", ("float64",)),
        (None, "bfloat16", "cuda:1", ("bfloat16",)),
        ("bfloat16", "bfloat16", "cpu", ("bfloat16",)),
        ("float16", "bfloat16", "cpu", ("float16",)),
    ],
)
def test_only_a_cpu_that_nobody_gave_a_dtype_has_a_choice(
    asked: str | None, own: str, device: str, possible: tuple[str, ...]
) -> None:
    assert possible_dtypes(asked, own, device) == possible


@pytest.mark.parametrize(
    ("narrow", "wide", "chosen"),
    [
        (8.9, 1.0, DtypeChoice("float32", "bfloat16", 8.9)),
        (1.25, 1.0, DtypeChoice("float32", "bfloat16", 1.2)),
        (1.2, 1.0, DtypeChoice("bfloat16")),
        (0.2, 1.0, DtypeChoice("bfloat16")),
    ],
)
def test_float32_is_picked_where_it_is_clearly_faster(
    narrow: float,
    wide: float,
    chosen: DtypeChoice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = timed(monkeypatch, narrow, wide)
    assert choose(tmp_path) == chosen
    assert calls == [BOTH]
    # It is made once, whatever the machine is like when the work goes on.
    calls = timed(monkeypatch, wide, narrow)
    assert choose(tmp_path) == chosen
    assert not calls


def test_nothing_is_timed_where_there_is_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = timed(monkeypatch, 8.9, 1.0)
    assert choose(tmp_path, ("bfloat16",)) == DtypeChoice("bfloat16")
    assert not calls and not (tmp_path / "dtype.json").exists()


@pytest.mark.parametrize("kept", ["", "[1]", "{}", '{"dtype": "float64"}', '{"color": 1}'])
def test_a_kept_choice_that_is_none_is_made_again(
    kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = timed(monkeypatch, 8.9, 1.0)
    (tmp_path / "dtype.json").write_text(kept)
    assert choose(tmp_path).dtype == "float32"
    assert calls == [BOTH]


def test_work_that_leaves_nothing_leaves_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 8.9, 1.0)
    with pytest.raises(ZeroDivisionError), chosen_dtype(BOTH, tmp_path):
        assert list(tmp_path.iterdir())
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_the_least_of_all_rounds_counts_and_the_threads_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock of which every product's second reading is later: bfloat16 by 5, float32 by 2, and
    all but the fourth round by 100 more."""
    now, readings = 0.0, 0

    def clock() -> float:
        nonlocal now, readings
        number, ends = divmod(readings, 2)
        readings += 1
        if ends:
            now += (5 if number % 2 == 0 else 2) + (0 if number // 2 == 3 else 100)
        return now

    monkeypatch.setattr(dtype_choice.time, "perf_counter", clock)
    before = torch.get_num_threads()
    assert seconds_of_products(BOTH) == [5, 2]
    assert torch.get_num_threads() == before


def test_what_is_picked_gives_the_bytes_of_what_is_asked_for(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, picked = tmp_path / "asked.safetensors", tmp_path / "picked.safetensors"
    assert main(words(MODEL, chats, asked, "--dtype", "float32")) == 0
    assert "computed      in float32 on cpu\n" in capsys.readouterr().out
    calls = timed(monkeypatch, 8.9, 1.0)
    command = words(MODEL, chats, picked, "--progress")
    assert main(command) == 0
    said = capsys.readouterr()
    why = "8.9 x faster here than the model's bfloat16"
    assert f"computed      in float32 on cpu: {why}\n" in said.out
    assert f"shardsurgeon: computing in float32: {why}\n" in said.err
    assert picked.read_bytes() == asked.read_bytes()
    assert calls == [BOTH]
    # Its result is there: that is known without a second timing.
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dtype"], report["dtype_reason"], report["layers_resumed"]) == (
        *("float32", None),
        3,
    )
    assert calls == [BOTH]


def test_an_interrupted_run_goes_on_in_the_dtype_that_it_began_with(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    timed(monkeypatch, 8.9, 1.0)
    assert main(words(MODEL, chats, whole)) == 0
    finished = FinishedLayers.finished_layer

    def stopped(self: FinishedLayers, *given: Any) -> None:
        finished(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FinishedLayers, "finished_layer", stopped)
        assert main(words(MODEL, chats, cut)) == 130
    calls = timed(monkeypatch, 0.2, 1.0)
    assert main(words(MODEL, chats, cut)) == 0
    assert not calls
    assert cut.read_bytes() == whole.read_bytes()


def test_a_file_is_extended_in_its_own_dtype_and_no_other(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = timed(monkeypatch, 0.2, 1.0)
    first, more, other = (tmp_path / f"{name}.safetensors" for name in ("first", "more", "other"))
    assert main(words(MODEL, chats, first, "--samples", "3", "--dtype", "float32")) == 0
    extend = ["--samples", "3", "--extend", str(first)]
    assert main(words(MODEL, chats, more, *extend)) == 0
    assert read_calibration(more).dtypes == ("float32",)
    assert not calls

    capsys.readouterr()
    monkeypatch.setattr(preparation, "load_packages", lambda: pytest.fail("torch is loaded"))
    assert main(words(MODEL, chats, other, *extend, "--dtype", "bfloat16")) == 2
    says = f"{first}: was made with --dtype float32, this calibration with bfloat16; leave --dtype"
    assert says in capsys.readouterr().err


def test_files_of_two_dtypes_are_merged_on_request_only() -> None:
    parts = [made(1, dtype="float32"), made(2, dtype="bfloat16"), made(3, dtype="float32")]
    with pytest.raises(
        ScoreError,
        match=r"^2\.pt: was made with --dtype bfloat16, 1\.pt with float32; calibrate alike, or",
    ):
        merge(parts, "s.pt")
    both = merge(parts, "s.pt", mixed=True)
    assert both.dtypes == ("bfloat16", "float32")
    assert "dtype" not in both.settings
    with pytest.raises(ScoreError, match=r"--dtype float32, s\.pt with bfloat16, float32"):
        merge([both, made(4, dtype="float32")], "t.pt")
    assert merge([parts[0], parts[2]], "s.pt").dtypes == ("float32",)
    # A file that does not say is of any dtype.
    assert merge([parts[0], made(5)], "s.pt").dtypes == ("float32",)


def test_merge_takes_the_flag(
    tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for share, dtype in (("1/2", "float32"), ("2/2", "bfloat16")):
        files.append(str(tmp_path / f"{dtype}.npz"))
        given = ["--share", share, "--dtype", dtype, "--max-length", "8"]
        assert main(words(MODEL, chats, Path(files[-1]), *given)) == 0
    command = ["scores", "merge", *files, "-o", str(tmp_path / "both.npz")]
    capsys.readouterr()
    assert main(command) == 2
    line = capsys.readouterr().err
    assert f"{files[1]}: was made with --dtype bfloat16, {files[0]} with float32" in line
    assert main([*command, "--mixed"]) == 0


def test_the_copy_of_a_recipe_names_the_dtype_that_was_picked(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (
        '[calibrate]\ndataset = "chats.jsonl:4"\nmax-length = 16\nout = "scores.npz"\n'
        '[apply]\nratio = 0.5\nout = "small"\n'
    )
    (tmp_path / "recipe.toml").write_text(f'model = "model"\n{recipe}')
    shutil.copytree(FIXTURES / MODEL, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    timed(monkeypatch, 8.9, 1.0)
    assert main(["run", "recipe.toml"]) == 0
    copy = Path("small/calibration/recipe.toml")
    assert tomllib.loads(copy.read_text())["calibrate"]["dtype"] == "float32"

    # Elsewhere, where bfloat16 is faster: the same scores, to the byte, and the same copy.
    Path("other").mkdir()
    shutil.copy(copy, "other")
    shutil.copy(chats, "other")
    timed(monkeypatch, 0.2, 1.0)
    assert main(["run", "other/recipe.toml", "--model", "model", "-o", "other/small"]) == 0
    for name in ("scores.npz", "recipe.toml"):
        there = Path("other/small/calibration", name).read_bytes()
        assert there == Path("small/calibration", name).read_bytes(), name
