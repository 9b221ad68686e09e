"""A calibration that is killed, stopped, split or extended has the same sums in the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import saving
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.calibration_file import merge, read_calibration
from shardsurgeon.operations.blend import blend_scores
from shardsurgeon.scores.files import read_scores
from tests.cli.standins import in_python
from tests.layerwise.chats import FIXTURES, assert_same, sums, words, write_chats

pytestmark = pytest.mark.torch

MODEL = "qwen3_moe"

# Runs a command and kills itself at the n-th call of a method.
KILLED = """
import os, signal, sys
from shardsurgeon.layerwise import saving
from shardsurgeon.layerwise.activations import ActivationStore
from shardsurgeon.layerwise.resume import FinishedLayers
from shardsurgeon.cli.main import main

saving.SAVE_SECONDS, saving.SAVED_SHARE = 0, 1  # with every layer

name, call, after = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "after"
owner = FinishedLayers if name == "finished_layer" else ActivationStore
method, calls = getattr(owner, name), []

def killing(self, *arguments):
    calls.append(name)
    if len(calls) == call and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    method(self, *arguments)
    if len(calls) == call:
        os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, killing)
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(chats: Path) -> dict[int, Accumulators]:
    out = chats.with_name("whole.json")
    assert main(words(MODEL, chats, out, "--dtype", "float32")) == 0
    return sums(out)


@pytest.fixture(scope="module")
def in_float64(chats: Path) -> Path:
    """A whole run in float64, where the grouping into batches changes no visible digit."""
    out = chats.with_name("exact.json")
    assert main(words(MODEL, chats, out, "--dtype", "float64")) == 0
    return out


def kill(command: list[str], name: str, call: int, when: str) -> None:
    done = in_python(KILLED, name, str(call), when, *command, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("name", "call", "when", "budget"),
    [
        ("keep", 3, "before", "1B"),  # inside of a layer, states in a file
        ("finished_layer", 2, "after", "1GB"),  # between two layers, states in memory
    ],
)
def test_a_killed_run_resumes_to_the_same_sums(
    tmp_path: Path,
    chats: Path,
    uninterrupted: dict[int, Accumulators],
    name: str,
    call: int,
    when: str,
    budget: str,
) -> None:
    out = tmp_path / "scores.json"
    command = words(MODEL, chats, out, "--dtype", "float32", "--activation-budget", budget)
    kill(command, name, call, when)
    assert not out.exists()
    left = {path.name for path in (tmp_path / "scores.json.partial" / "files").iterdir()}
    assert "layer-00000.json" in left
    assert main(command) == 0
    assert_same(sums(out), uninterrupted, rtol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.fixture(scope="module")
def mix(chats: Path) -> str:
    """Two datasets, of which 5 and 7 samples are drawn."""
    other = write_chats(chats.with_name("other.jsonl"), seed=2)
    return f"{chats}:5,{other}:7"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_over_a_mix_resumes_to_the_same_bytes(tmp_path: Path, mix: str) -> None:
    whole, out = tmp_path / "whole.json", tmp_path / "scores.json"
    command = words(MODEL, mix, out, "--dtype", "float32")
    assert main(words(MODEL, mix, whole, "--dtype", "float32")) == 0
    kill(command, "keep", 3, "before")
    assert main(command) == 0
    assert out.read_bytes() == whole.read_bytes()
    calibration = read_calibration(out)
    assert [(part.name, part.records) for part in sorted(calibration.parts, key=str)] == [
        ("chats", 5),
        ("other", 7),
    ]
    # All samples in one run are the parts with equal weights, but for the order of additions.
    blend_scores([out], tmp_path / "blend.json", weights={"chats": 1, "other": 1})
    layers = read_scores(out).layers
    for layer, metrics in read_scores(tmp_path / "blend.json").layers.items():
        for metric, row in metrics.items():
            np.testing.assert_allclose(row, layers[layer][metric], rtol=1e-12, err_msg=metric)


def test_a_mix_in_shares_or_dataset_by_dataset_has_the_sums_of_each_part(
    tmp_path: Path, mix: str
) -> None:
    def run(dataset: str, name: str, *more: str) -> dict[int, Accumulators]:
        out = tmp_path / name
        assert main([*words(MODEL, dataset, out, "--dtype", "float64"), *more]) == 0
        return sums(out)

    whole = run(mix, "whole.json")
    assert {len(of.parts or {}) for of in whole.values()} == {2}
    for share in ("1/2", "2/2"):
        run(mix, f"{share[0]}.json", "--share", share)
    merged = merge([read_calibration(tmp_path / f"{n}.json") for n in (1, 2)], "merged.json")
    assert_same(merged.layers, whole, rtol=1e-12)
    first, _, second = mix.partition(",")
    alone = run(first, "first.json", "--samples", "5")
    assert {of.parts for of in alone.values()} == {None}
    more = ("--samples", "7", "--extend", str(tmp_path / "first.json"))
    assert_same(run(second, "extended.json", *more), whole, rtol=1e-12)


def test_a_mix_of_an_earlier_version_is_extended_without_parts_which_is_said(
    tmp_path: Path, mix: str, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, out = tmp_path / "old.json", tmp_path / "scores.json"
    assert main(words(MODEL, mix, old, "--dtype", "float32")) == 0
    tree = json.loads(old.read_text())
    del tree["parts"]
    old.write_text(json.dumps(tree))
    command = words(MODEL, chats, out, "--samples", "2", "--extend", str(old), "--json")
    capsys.readouterr()
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    said = f"{out} does not keep the sums of its 2 datasets apart: an earlier version"
    assert report["parts"] == [] and report["notes"][-1].startswith(said)
    assert "parts" not in json.loads(out.read_text())


def interrupt(monkeypatch: pytest.MonkeyPatch, command: list[str], after: int = 1) -> None:
    """Stop the command, as Ctrl-C would, after its n-th generation of activations."""
    advance, calls = ActivationStore.advance, []
    # With every layer.
    monkeypatch.setattr(saving, "SAVE_SECONDS", 0)
    monkeypatch.setattr(saving, "SAVED_SHARE", 1)

    def stop(self: ActivationStore, layers: int) -> None:
        advance(self, layers)
        self._saver._wait()
        calls.append(self.generation)
        if len(calls) > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ActivationStore, "advance", stop)
        assert main(command) == 130


def test_finished_layers_are_not_computed_again(
    tmp_path: Path,
    chats: Path,
    uninterrupted: dict[int, Accumulators],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(MODEL, chats, tmp_path / "scores.json", "--dtype", "float32", "--json")
    interrupt(monkeypatch, command, after=2)
    capsys.readouterr()
    written: list[int] = []
    keep = ActivationStore.keep
    monkeypatch.setattr(
        ActivationStore, "keep", lambda store, *given: (written.append(1), keep(store, *given))[1]
    )
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["layers_resumed"] == 2
    assert not written  # Only the last of three layers was left, whose output is not needed.
    assert_same(sums(tmp_path / "scores.json"), uninterrupted, rtol=0)


def test_an_upgrade_meanwhile_costs_nothing(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "scores.json"
    command = words(MODEL, chats, out, "--dtype", "float32")
    interrupt(monkeypatch, command)
    capsys.readouterr()
    monkeypatch.setattr("shardsurgeon.layerwise.identity.__version__", "99.0")
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers_resumed"] > 0


@pytest.mark.parametrize(
    "more", [["--dtype", "float64"], ["--seed", "43"], ["--batch-size", "1"], ["--samples", "8"]]
)
def test_another_command_is_refused_without_restart(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    out = tmp_path / "scores.json"
    interrupt(monkeypatch, words(MODEL, chats, out, "--dtype", "float32"))
    capsys.readouterr()
    other = words(MODEL, chats, out, "--dtype", "float32", *more)
    assert main(other) == 2
    line = capsys.readouterr().err
    assert "by `shardsurgeon calibrate " in line and "this is a different command" in line
    assert "--restart" in line and line.count("\n") == 1
    if more == ["--seed", "43"]:
        assert main([*other, "--restart"]) == 0
        assert read_calibration(out).settings["seed"] == 43


def test_a_model_that_changed_meanwhile_is_named(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(FIXTURES / MODEL, tmp_path / "model"))
    out = tmp_path / "scores.json"
    command = words(MODEL, chats, out)
    command[1] = str(model)
    interrupt(monkeypatch, command)
    capsys.readouterr()
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert main(command) == 2
    assert f"{shard.name} was written to" in capsys.readouterr().err


def test_a_broken_layer_is_refused(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = words(MODEL, chats, tmp_path / "scores.json")
    interrupt(monkeypatch, command)
    (tmp_path / "scores.json.partial" / "files" / "layer-00000.json").write_text("{}")
    capsys.readouterr()
    assert main(command) == 2
    assert "layer-00000.json: is not what a calibration wrote" in capsys.readouterr().err


def test_two_shares_merged_are_the_whole(tmp_path: Path, chats: Path, in_float64: Path) -> None:
    parts = []
    for share in ("1/2", "2/2"):
        out = tmp_path / f"{share[0]}.pt"
        more = ["--dtype", "float64", "--share", share]
        assert main(words(MODEL, chats, out, *more)) == 0
        parts.append(read_calibration(out))
    whole = merge(parts, "whole")
    assert_same(whole.layers, sums(in_float64), rtol=1e-12)
    assert sorted(whole.samples) == sorted(read_calibration(in_float64).samples)


def test_an_extended_calibration_is_the_longer_one(
    tmp_path: Path, chats: Path, in_float64: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.pt"
    few = ["--dtype", "float64", "--samples", "5"]
    more = ["--dtype", "float64", "--samples", "7", "--extend", str(first)]
    assert main(words(MODEL, chats, first, *few)) == 0
    assert main(words(MODEL, chats, second, *more)) == 0
    assert_same(sums(second), sums(in_float64), rtol=1e-12)
    assert sorted(read_calibration(second).samples) == sorted(read_calibration(in_float64).samples)


def test_only_the_same_model_is_extended(
    tmp_path: Path, chats: Path, in_float64: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words("deepseek_v3", chats, tmp_path / "a.pt", "--extend", str(in_float64))
    assert main(command) == 2
    assert "was made for qwen3_moe, config" in capsys.readouterr().err


def test_a_model_under_another_name_is_refused_before_it_is_run(
    tmp_path: Path, chats: Path, in_float64: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(FIXTURES / MODEL, tmp_path / "renamed")
    # As a path of its own it stands for itself.
    command = words(str(model), chats, tmp_path / "a.pt", "--extend", str(in_float64))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"was made with model {MODEL}, this one is renamed; calibrate anew" in said
    assert not list(tmp_path.glob("a.pt*"))
