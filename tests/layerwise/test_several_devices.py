"""A calibration in several processes, with the real engine: the sums of one, whatever is killed.

No GPU is needed: every process computes on the CPU. Each imports torch, which takes seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import processes, run
from shardsurgeon.layerwise.worker import Job
from tests.cli.standins import ROOT
from tests.layerwise.chats import assert_same, sums, words, write_chats

pytestmark = pytest.mark.torch

MODEL = "qwen3_moe"
# The command line, on as many devices as the first word says. Each saves every layer, and rests
# behind it, so that a kill at random finds it anywhere.
PROGRAM = """
import sys
from shardsurgeon.cli.main import main
from shardsurgeon.layerwise import processes, run

SLOWLY = '''
import time
from shardsurgeon.layerwise import resume, saving
saving.SAVE_SECONDS, saving.SAVED_SHARE = 0, 1
finished = resume.FinishedLayers.finished_layer
resume.FinishedLayers.finished_layer = lambda *given: (finished(*given), time.sleep(0.7))[0]
'''
run.devices = lambda settings: ["cpu"] * int(sys.argv[1])
processes._CHILD = processes._CHILD.replace("from shard", SLOWLY + "from shard", 1)
sys.exit(main(sys.argv[2:]))
"""
IN_TWO = [sys.executable, "-c", PROGRAM, "2"]
AS_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
AS_RANKS += ["-m", "shardsurgeon"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture
def on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "devices", lambda settings: ["cpu"] * 2)


@pytest.fixture
def long(loop: str) -> None:
    if loop != "long":
        pytest.skip("imports torch several times: in the long loop")


@pytest.mark.slow
@pytest.mark.usefixtures("on_two")
def test_two_processes_find_the_sums_of_one(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    given = ["--dtype", "float64", "--progress"]
    mix = f"{chats}:9,{write_chats(chats.with_name('other.jsonl'), seed=2)}:3"
    assert main(words(MODEL, mix, two, *given)) == 0
    captured = capsys.readouterr()
    assert "on cpu, cpu" in captured.out
    assert "error" not in captured.err and captured.err.count("calibrating") >= 1
    monkeypatch.setattr(run, "devices", processes.devices)
    assert main(words(MODEL, mix, one, *given)) == 0
    assert {len(of.parts or {}) for of in sums(one).values()} == {2}
    assert_same(sums(two), sums(one), rtol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_a_run_goes_on_with_as_many_devices_only(
    tmp_path: Path,
    chats: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(job: Job, *given: object) -> None:
        (job.folder / "shares.json").write_text("[]")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "calibrate_apart", stopped)
    command = words(MODEL, chats, tmp_path / "scores.json")
    for count, status in ((2, 130), (3, 2), (1, 2), (2, 130)):
        monkeypatch.setattr(run, "devices", lambda settings, count=count: ["cpu"] * count)
        capsys.readouterr()
        assert main(command) == status
        line = capsys.readouterr().err
        assert status != 2 or f"(devices: 2, this one {count}); repeat that command" in line


def environment() -> dict[str, str]:
    # One core for each, so that sums are rounded alike.
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.usefixtures("long")
def test_ranks_of_torchrun_write_the_same_file_and_speak_once(tmp_path: Path, chats: Path) -> None:
    found = []
    for program, out in ((IN_TWO, tmp_path / "a.json"), (AS_RANKS, tmp_path / "b.json")):
        command = [*program, *words(MODEL, chats, out, "--dtype", "float32")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Scores saved in") == 1
        found.append(out.read_bytes())
    assert found[0] == found[1]
    one = tmp_path / "one.json"
    assert main(words(MODEL, chats, one, "--dtype", "float32")) == 0
    assert_same(sums(tmp_path / "a.json"), sums(one), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("long")
def test_what_one_rank_refuses_is_said_once(tmp_path: Path, chats: Path) -> None:
    command = [*AS_RANKS, *words(MODEL, chats, tmp_path / "a.json", "--samples", "13")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("of which 12 can be drawn; 13 samples were asked for") == 1
    assert done.stderr.count("shardsurgeon: ") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.usefixtures("long")
@pytest.mark.parametrize("whom", ["parent", "worker", "terminal"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path, whom: str) -> None:
    import psutil

    chats = write_chats(tmp_path / "chats.jsonl", 60)
    more = ["--dtype", "float32", "--batch-size", "1", "--samples", "60"]
    wanted, out = tmp_path / "wanted.json", tmp_path / "scores.json"
    subprocess.run([*IN_TWO, *words(MODEL, chats, wanted, *more)], env=environment(), check=True)
    command = [*IN_TWO, *words(MODEL, chats, out, *more)]
    at_work = tmp_path / "scores.json.partial" / "files" / "1" / "shardsurgeon.lock"
    for seed in range(3):
        parent = subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True, process_group=0
        )
        while parent.poll() is None and not at_work.exists():
            time.sleep(0.01)
        # Until the first layer has begun, seconds pass.
        time.sleep(random.Random(seed).uniform(0.0, 5.0))
        workers = psutil.Process(parent.pid).children() if parent.poll() is None else []
        if whom == "parent":
            parent.kill()
        elif whom == "terminal":
            with suppress(ProcessLookupError):  # it was done
                os.killpg(parent.pid, signal.SIGINT)
        elif workers:
            workers[-1].kill()
        said = parent.communicate()[1]
        if workers and whom == "worker" and not out.exists():
            assert "error: cpu: its process was killed by SIGKILL" in said
            assert said.count("\n") == 1
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    subprocess.run(command, env=environment(), check=True)
    assert out.read_bytes() == wanted.read_bytes()
    assert not at_work.exists()
