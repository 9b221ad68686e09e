"""Several devices: how samples are shared out, and what becomes of workers that end in any way.

The engine is a stand-in here; `test_several_devices` has the real one.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsurgeon.errors import (
    FamilyError,
    OutputError,
    ShardSurgeonError,
    UndeclaredFamilyError,
    UsageError,
    WorkError,
)
from shardsurgeon.execution.journal import Run
from shardsurgeon.layerwise import processes, resume
from shardsurgeon.layerwise.accumulators import Accumulators
from shardsurgeon.layerwise.processes import calibrate_apart, devices, shares
from shardsurgeon.layerwise.settings import Progress, Settings
from tests.cli.standins import ROOT
from tests.layerwise import standin_worker
from tests.layerwise.standin_worker import job

CHILD = processes._CHILD.replace("shardsurgeon.layerwise.worker", "tests.layerwise.standin_worker")
TWO = ("cpu", "cpu")
# A program that calibrates on two stand-ins, which wait; on SIGTERM it raises SystemExit.
PARENT = f"""
import signal, sys
from pathlib import Path
from shardsurgeon.execution.journal import Run
from shardsurgeon.layerwise import processes, resume
from tests.layerwise.standin_worker import job

processes._CHILD = {CHILD!r}
signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
does = {{"waits": 2, "adds": 1}}
processes.calibrate_apart(job(Path(sys.argv[1]), does), ("cpu", "cpu"), (), None, lambda now: None)
"""


class Sink:
    """Keeps what it is given, in the order of it."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[bool, Accumulators]] = {}

    def finished_layer(self, index: int, is_mtp: bool, accumulators: Accumulators) -> None:
        self.layers[index] = is_mtp, accumulators

    def done_layers(self) -> set[int]:
        return set(self.layers)


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CHILD", CHILD)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_every_sample_is_in_one_share_and_shares_differ_by_one_sample_at_most(
    lengths: list[int], count: int
) -> None:
    dealt = shares(lengths, count)
    assert sorted(position for share in dealt for position in share) == list(range(len(lengths)))
    tokens = [sum(lengths[position] for position in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)
    assert all(share for share in dealt) or len(lengths) < count


def test_the_longest_sample_goes_to_who_has_the_fewest_tokens() -> None:
    # 9 | 8 | 8+3 against 9, 8: the 3 goes to the first of the two that have 8.
    assert shares([3, 8, 9, 8, 1], 3) == [[2], [0, 1], [3, 4]]


@pytest.mark.parametrize(("name", "used"), [("cpu", ["cpu"]), ("cuda:1", ["cuda:1"])])
def test_a_named_device_is_used_alone(name: str, used: list[str]) -> None:
    assert devices(Settings(name)) == used


def test_each_rank_of_torchrun_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}
    for name, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert devices(Settings("cuda")) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices(Settings("cpu")) == ["cpu"] * 3
    with pytest.raises(UsageError, match="is one device, and torchrun starts 3 processes"):
        devices(Settings("cuda:1"))


@pytest.mark.parametrize("kind", [FamilyError, WorkError, UndeclaredFamilyError])
def test_an_error_passes_from_process_to_process(kind: type[ShardSurgeonError]) -> None:
    error = kind("here", "is 3", "make it 4")
    if isinstance(error, UndeclaredFamilyError):
        error.skeleton = "a = 1"
    came = pickle.loads(pickle.dumps(error))
    assert type(came) is kind and str(came) == "here: is 3; make it 4"
    assert vars(came) == vars(error) and came.exit_status == error.exit_status


@pytest.mark.slow
def test_sums_are_added_in_the_order_of_the_shares_and_progress_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink, said = Sink(), list[Progress]()
    whole = job(tmp_path, {"a": 5, "b": 3, "c": 1, "warns": 6})
    with caplog.at_level(logging.INFO, "shardsurgeon"):
        calibrate_apart(whole, TWO, (), sink, said.append)
    assert {layer: is_mtp for layer, (is_mtp, _) in sink.layers.items()} == {0: False, 3: True}
    for layer, (_, found) in sink.layers.items():
        # The longest is the last; 6 + 1 and 5 + 3 tokens.
        wanted = Accumulators.zeros(standin_worker.EXPERTS)
        for share in ([2, 3], [0, 1]):
            wanted.add(standin_worker.sums([whole.samples[at] for at in share], layer))
        assert found.total_tokens == 15
        assert found.norm_sum.tolist() == wanted.norm_sum.tolist()
    assert {now.tokens_total for now in said} == {30} and said[-1].tokens_done == 30
    assert said[-1].layers_done == said[-1].layers_total == 2
    assert json.loads((tmp_path / "shares.json").read_text()) == [[2, 3], [0, 1]]
    assert caplog.messages.count("cpu: budget 500, 2 share the cores") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind", "line"),
    [
        ("refuses", FamilyError, "layer 7: has 3 gates; declare them"),
        ("breaks", ZeroDivisionError, "no tokens"),
        pytest.param(
            *("dies", WorkError, "cpu: its process was killed by SIGKILL; see whether memory"),
            marks=pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL"),
        ),
    ],
)
def test_what_ends_one_worker_is_raised_and_the_other_is_stopped(
    tmp_path: Path, what: str, kind: type[Exception], line: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(kind, match=line) as caught:
        calibrate_apart(job(tmp_path, {"waits": 2, what: 1}), TWO, (), Sink(), print)
    assert time.monotonic() - begin < 30
    assert what != "breaks" or "standin_worker.py" in caught.value.__notes__[0]
    # It was told, and took its time to keep what it had; or it had not begun.
    assert not (tmp_path / "0" / "pid").exists() or (tmp_path / "0" / "kept").exists()


@pytest.mark.slow
def test_a_run_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FamilyError):
        calibrate_apart(job(tmp_path, {"refuses": 1, "refuses ": 1}), TWO, (), Sink(), print)
    assert list(tmp_path.iterdir()) == []


def test_shares_are_not_decided_anew(tmp_path: Path) -> None:
    whole = job(tmp_path, {"a": 5, "b": 3, "c": 1, "d": 6})
    assert processes._kept_shares(whole, 2) == [[2, 3], [0, 1]]
    other = [[0, 1, 2], [3]]  # as a version with another rule would
    (tmp_path / "shares.json").write_text(json.dumps(other))
    assert processes._kept_shares(whole, 2) == other


@pytest.mark.parametrize("content", ["[[0], [0]]", "[[0, 1]]", "[[0], [1], []]", "{", "[[0], 1]"])
def test_shares_of_another_kind_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "shares.json").write_text(content)
    with pytest.raises(OutputError, match="not how 2 samples were shared out to 2 devices"):
        processes._kept_shares(job(tmp_path, {"a": 1, "b": 1}), 2)


def test_layers_that_every_worker_has_saved_are_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = {"0": 3, "1": 2, "files": 9}
    monkeypatch.setattr(resume, "saved_layers", lambda folder: saved[folder.name])
    with resume.partial_calibration(tmp_path / "a.pt", Run("a", "b", ()), 5) as partial:
        for layer in range(4):
            sums = standin_worker.sums([], layer)
            partial.layers.finished_layer(layer, False, sums)
        assert partial.num_resumed == 4
        for name in "01":
            (partial.activations / name).mkdir()
        assert partial.num_resumed == 2
        partial.clear()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="other signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_no_worker_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PARENT, str(tmp_path)]
    parent = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, process_group=0)
    pid = tmp_path / "0" / "pid"
    until(pid.exists)
    worker = int(pid.read_text())
    if number == signal.SIGINT:  # a terminal sends it to all
        os.killpg(parent.pid, number)
    else:
        os.kill(parent.pid, number)
    said = parent.communicate(timeout=30)[1].decode()
    until(lambda: not is_alive(worker))
    # Without a parent it ends at once: the next run may be waiting for its folder.
    assert (tmp_path / "0" / "kept").exists() == (number != signal.SIGKILL)
    assert "Fatal" not in said and said.count("Traceback") == (number == signal.SIGINT)
