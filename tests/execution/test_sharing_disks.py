"""Blocks shared on real file systems: XFS and btrfs in loop devices, and ext4, which cannot.

Needs root and mkfs.xfs and mkfs.btrfs, and is skipped elsewhere:

    apt-get install xfsprogs btrfs-progs
    sudo python -m pytest tests/execution/test_sharing_disks.py
"""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from shutil import copytree

import pytest

from shardsurgeon.errors import OutputWriteError
from shardsurgeon.execution.run import ExecutionReport, execute, rehearse
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.system import default_system, native, portable
from tests.bench.measure import disk
from tests.support.shared_blocks import make_aligned_job, shared_of
from tests.support.tiny_job import Job, content

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root and loop devices"
    ),
]

SHARING = ["xfs", "btrfs"]
# One piece of the job is that many blocks; the model then has 33 MB.
SCALE = 80
DISK_NBYTES = 1 << 30


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """A disk of its own, or the test is skipped."""
    made = disk(kind, DISK_NBYTES, folder)
    try:
        place = made.__enter__()
    except (SystemExit, FileNotFoundError) as reason:
        pytest.skip(f"no {kind} in a loop device: {reason}")
    try:
        yield place
    finally:
        made.__exit__(None, None, None)


@pytest.fixture(params=SHARING)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(str(request.param), tmp_path) as place:
        yield place


def free(place: Path) -> int:
    """Bytes that are free once everything is on the disk."""
    subprocess.run(["sync", "--file-system", str(place)], check=True)
    status = os.statvfs(place)
    return status.f_bfree * status.f_frsize


def run(job: Job, out: Path) -> ExecutionReport:
    return execute(job.plan, job.source, out, workers=2, system=default_system())


def total(job: Job) -> int:
    return sum(map(len, job.expected.values()))


def test_what_is_shared_takes_no_disk(place: Path) -> None:
    job = make_aligned_job(place, SCALE)
    before = free(place)
    report = run(job, place / "OUT")
    taken = before - free(place)
    assert content(place / "OUT") == job.expected
    assert report.bytes_shared == shared_of(job.plan) > 12_000_000
    assert report.bytes_copied == total(job) - report.bytes_shared
    # btrfs counts its metadata twice.
    assert taken < report.bytes_copied + 600_000
    known = 0
    for name in ("model-1.safetensors", "sub/model-2.safetensors", "tokenizer.json"):
        with FileIO(place / "OUT" / name) as file:
            known += native().shared(file)
    assert known == report.bytes_shared


@pytest.mark.parametrize("of", ["source", "result"])
def test_neither_source_nor_result_changes_with_the_other(place: Path, of: str) -> None:
    job = make_aligned_job(place, SCALE)
    run(job, place / "OUT")
    model, out = place / "Tiny-MoE", place / "OUT"
    changed, kept = (model, out) if of == "source" else (out, model)
    before = content(kept)
    for path in changed.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert content(kept) == before
    assert content(changed) != before


def test_a_disk_with_room_for_the_edges_alone_is_large_enough(place: Path) -> None:
    job = make_aligned_job(place, 4 * SCALE)
    needed = total(job) - shared_of(job.plan)
    free(place)  # only now is it known what the model takes
    with (place / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, native().free_space(place) - total(job) // 2)
    free(place)
    assert needed < native().free_space(place) < total(job)
    with pytest.raises(OutputWriteError, match="the disk is too small"):
        execute(job.plan, job.source, place / "OUT", system=portable())
    assert rehearse(job.plan, job.source, place / "OUT").needed == needed
    report = run(job, place / "OUT")
    assert report.bytes_shared == shared_of(job.plan)
    assert content(place / "OUT") == job.expected


def test_ext4_shares_nothing_and_is_told_so(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path) as place:
        job = make_aligned_job(place, SCALE)
        assert rehearse(job.plan, job.source, place / "OUT").needed == total(job)
        report = run(job, place / "OUT")
        assert (report.bytes_shared, report.bytes_copied) == (0, total(job))
        assert content(place / "OUT") == job.expected


def test_a_trial_leaves_nothing(place: Path) -> None:
    job = make_aligned_job(place)
    before = sorted(place.rglob("*")), free(place)
    assert rehearse(job.plan, job.source, place / "OUT").needed < total(job)
    assert (sorted(place.rglob("*")), free(place)) == before


def test_subvolumes_share_though_they_are_devices_of_their_own(tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path) as place:
        models = place / "models"
        subprocess.run(["btrfs", "subvolume", "create", models], check=True, capture_output=True)
        job = make_aligned_job(models, SCALE)
        assert models.stat().st_dev != place.stat().st_dev
        report = run(job, place / "OUT")
        assert report.bytes_shared == shared_of(job.plan)
        assert content(place / "OUT") == job.expected


def test_shards_that_are_links_to_another_disk_are_copied(place: Path, tmp_path: Path) -> None:
    job = make_aligned_job(place, SCALE)
    shard = place / "Tiny-MoE" / "b.safetensors"
    (tmp_path / "b.safetensors").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(tmp_path / "b.safetensors")
    source = LocalSource(place / "Tiny-MoE", follow_links=True)
    plan = replace(job.plan, source_files=source.list())
    needed = rehearse(plan, source, place / "OUT").needed
    report = execute(plan, source, place / "OUT")
    assert 0 < report.bytes_shared < shared_of(plan)
    assert needed == report.bytes_copied
    assert content(place / "OUT") == job.expected


def test_the_environment_can_ask_for_copies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_aligned_job(place, SCALE)
    monkeypatch.setenv("SHARDSURGEON_PORTABLE", "1")
    assert run(job, place / "OUT").bytes_shared == 0
    assert content(place / "OUT") == job.expected


def test_the_disk_of_what_a_killed_run_shared_is_not_counted_as_free(place: Path) -> None:
    job = make_aligned_job(place, SCALE)
    run(job, place / "OUT")
    left = WorkDir(place / "OUT", native())
    copytree(place / "OUT", left.writing / "copied")
    (place / "OUT").rename(left.writing / "shared")
    unshared = total(job) + total(job) - shared_of(job.plan)
    before = free(place)
    counted = left.space() - native().free_space(place)
    assert abs(counted - unshared) < 200_000
    subprocess.run(["rm", "-r", left.writing], check=True)
    begun = time.monotonic()
    while free(place) - before <= counted - 600_000:  # XFS gives it back at its leisure
        assert time.monotonic() - begun < 30
        time.sleep(0.1)
