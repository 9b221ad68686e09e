"""Shards sent as they are finished: within the budget, each once, published all together."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardsurgeon.errors import OutputError, OutputWriteError, PublishError, UsageError
from shardsurgeon.execution import shards, upload
from shardsurgeon.execution.journal import read_journal
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.upload import DiskBudget, ShardUploader
from shardsurgeon.execution.workers import Progress, ProgressMeter, Stopped
from shardsurgeon.storage.system import System, portable
from tests.support.far_source import FarSource, FolderDestination, far_job, receipts
from tests.support.tiny_job import Job, content, make_job

ONE, TWO, THREE = "model-1.safetensors", "model-2.safetensors", "sub/model-3.safetensors"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "REMOTE_BATCH_NBYTES", 5_000)
    monkeypatch.setattr(shards, "BATCH_NBYTES", 5_000)


@pytest.fixture(params=["local", "remote"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    job = make_job(tmp_path)
    return job if request.param == "local" else far_job(job)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


@pytest.fixture
def destination(tmp_path: Path) -> FolderDestination:
    return FolderDestination(tmp_path)


def on_disk(out: Path) -> int:
    """Bytes of shards below OUT.partial."""
    files = (path for path in out.with_name("OUT.partial").rglob("*.safetensors"))
    total = 0
    for path in files:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # sent meanwhile
            continue
    return total


@pytest.mark.parametrize("workers", [1, 4])
def test_everything_arrives_and_nothing_stays(
    job: Job, out: Path, destination: FolderDestination, workers: int
) -> None:
    report = execute(job.plan, job.source, out, workers=workers, destination=destination)
    assert destination.content() == job.expected
    assert sorted(destination.sends) == [ONE, TWO, THREE]
    assert report.shards == 3
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "arrived", "delivered", "scores.pt"]


def test_the_shards_on_the_disk_stay_within_the_budget(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    budget = len(job.expected[TWO])
    most = 0

    def listen(progress: Progress) -> None:
        nonlocal most
        most = max(most, on_disk(out))

    execute(
        job.plan,
        job.source,
        out,
        destination=destination,
        disk_budget=budget,
        on_progress=listen,
        workers=3,
    )
    assert destination.content() == job.expected
    assert 0 < most <= budget


def test_others_are_filled_while_one_is_sent(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    filled = threading.Event()

    def on_send(name: str) -> None:
        if name == ONE:
            assert filled.wait(timeout=30)

    def listen(progress: Progress) -> None:
        if progress.shards_done == 2:
            filled.set()

    destination.on_send = on_send
    execute(job.plan, job.source, out, destination=destination, on_progress=listen, workers=2)
    assert destination.content() == job.expected


def test_progress_tells_of_shards_that_were_sent(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    steps: list[Progress] = []
    execute(job.plan, job.source, out, destination=destination, on_progress=steps.append)
    total = sum(map(len, job.expected.values()))
    assert steps[-1] == Progress(total, total, 0, 3, 3, 3)
    assert [step.shards_sent for step in steps] == sorted(step.shards_sent for step in steps)


def test_what_is_not_sent_is_shown_before_anything_is_published(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    def check(folder: Path) -> None:
        rest = {name: data for name, data in job.expected.items() if "safetensors" not in name}
        assert content(folder) == rest
        assert not destination.delivered.exists()
        raise PublishError("hf://me/pruned", "does not hold")

    with pytest.raises(PublishError):
        execute(job.plan, job.source, out, destination=destination, before_delivery=check)
    assert not destination.delivered.exists()
    execute(job.plan, job.source, out, destination=destination)
    assert len(destination.sends) == 3
    assert destination.content() == job.expected


@pytest.mark.parametrize("short", [1, 30_000])
def test_a_budget_below_the_largest_shard_is_refused_before_anything(
    job: Job, out: Path, destination: FolderDestination, short: int
) -> None:
    largest = len(job.expected[TWO])
    said = rf"--disk-budget: .*\({largest - short:,} bytes\) .*{TWO}.* \({largest:,} bytes\); give "
    with pytest.raises(UsageError, match=said):
        execute(job.plan, job.source, out, destination=destination, disk_budget=largest - short)
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "scores.pt"]


def test_a_disk_as_small_as_the_budget_is_enough(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    budget = len(job.expected[TWO]) + 100
    short = replace(portable(), free_space=lambda folder: budget - 1)
    with pytest.raises(OutputWriteError, match="the disk is too small"):
        execute(
            job.plan, job.source, out, destination=destination, disk_budget=budget, system=short
        )
    enough = replace(portable(), free_space=lambda folder: budget)
    execute(job.plan, job.source, out, destination=destination, disk_budget=budget, system=enough)
    assert destination.content() == job.expected


def fail_at(destination: FolderDestination, shard: str, error: Callable[[], BaseException]) -> None:
    def on_send(name: str) -> None:
        if name == shard:
            raise error()

    destination.on_send = on_send


@pytest.mark.parametrize("shard", [ONE, TWO, THREE])
def test_a_send_that_fails_ends_the_run_and_the_next_sends_only_the_rest(
    job: Job, out: Path, destination: FolderDestination, shard: str
) -> None:
    before = threading.active_count()
    fail_at(destination, shard, lambda: PublishError("hf://me/pruned", "the Hub refused"))
    with pytest.raises(PublishError, match="the Hub refused"):
        execute(job.plan, job.source, out, destination=destination, workers=1)
    assert threading.active_count() == before
    assert not destination.delivered.exists() and not out.exists()
    sent = set(receipts(out))
    assert sent == set(destination.sends)
    destination.on_send = lambda name: None
    destination.sends.clear()
    report = execute(job.plan, job.source, out, destination=destination)
    assert set(destination.sends) == {ONE, TWO, THREE} - sent
    assert report.shards_resumed >= len(sent)
    assert destination.content() == job.expected


def test_a_failed_copy_lets_the_shard_in_hand_be_sent(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    sending, failed = threading.Event(), threading.Event()

    def on_send(name: str) -> None:
        sending.set()
        assert failed.wait(timeout=30)

    def listen(progress: Progress) -> None:
        if progress.done > len(job.expected[ONE]):
            assert sending.wait(timeout=30)
            failed.set()
            raise OutputWriteError("disk", "failed")

    destination.on_send = on_send
    with pytest.raises(OutputWriteError, match="disk: failed"):
        execute(job.plan, job.source, out, destination=destination, workers=1, on_progress=listen)
    assert set(receipts(out)) == {ONE}
    destination.on_send = lambda name: None
    execute(job.plan, job.source, out, destination=destination)
    assert sorted(destination.sends) == [ONE, TWO, THREE]
    assert destination.content() == job.expected


def test_ctrl_c_does_not_wait_for_a_shard_that_is_being_sent(
    job: Job, out: Path, destination: FolderDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "UPLOAD_GRACE_SECONDS", 0.01)
    sending, let_go = threading.Event(), threading.Event()

    def on_send(name: str) -> None:
        sending.set()
        assert let_go.wait(timeout=30)

    def listen(progress: Progress) -> None:
        if progress.done > len(job.expected[ONE]):
            assert sending.wait(timeout=30)
            raise KeyboardInterrupt

    destination.on_send = on_send
    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, destination=destination, workers=1, on_progress=listen)
    (left,) = [thread for thread in threading.enumerate() if thread.name == "shardsurgeon-send"]
    assert left.daemon
    destination.on_send = lambda name: None
    execute(
        job.plan, job.source, out, destination=destination
    )  # the same shard may arrive twice by then
    assert destination.content() == job.expected
    let_go.set()
    left.join(timeout=30)
    assert destination.content() == job.expected
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "arrived", "delivered", "scores.pt"]


def test_a_shard_that_arrives_within_a_moment_after_ctrl_c_is_noted(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    sending = threading.Event()
    destination.on_send = lambda name: sending.set()

    def listen(progress: Progress) -> None:
        if progress.done > len(job.expected[ONE]):
            assert sending.wait(timeout=30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, destination=destination, workers=1, on_progress=listen)
    assert set(receipts(out)) == {ONE}


def test_a_delivery_that_fails_is_tried_again_without_sending(
    job: Job, out: Path, destination: FolderDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, receipts: object) -> None:
        raise PublishError("hf://me/pruned", "the Hub refused the commit")

    with monkeypatch.context() as patch:
        patch.setattr(destination, "publish", refuse)
        with pytest.raises(PublishError, match="refused the commit"):
            execute(job.plan, job.source, out, destination=destination)
    assert set(receipts(out)) == {ONE, TWO, THREE}
    assert on_disk(out) == 0
    report = execute(job.plan, job.source, out, destination=destination)
    assert (len(destination.sends), report.shards_resumed) == (3, 3)
    assert destination.content() == job.expected
    assert not out.with_name("OUT.partial").exists()


def test_receipts_of_another_outlet_are_refused(
    job: Job, out: Path, destination: FolderDestination, tmp_path: Path
) -> None:
    fail_at(destination, TWO, lambda: PublishError("hf://me/pruned", "the Hub refused"))
    with pytest.raises(PublishError):
        execute(job.plan, job.source, out, destination=destination, workers=1)
    said = r"OUT\.partial: .* sent 1 of its shards to .*delivered; repeat that command.*--restart"
    with pytest.raises(OutputError, match=said):
        execute(job.plan, job.source, out, destination=FolderDestination(tmp_path / "other"))
    with pytest.raises(OutputError, match=said):
        execute(job.plan, job.source, out)
    assert set(receipts(out)) == {ONE}
    execute(job.plan, job.source, out, restart=True)
    assert content(out) == job.expected


def test_a_run_that_was_to_stay_here_can_be_sent_instead(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    def listen(progress: Progress) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=listen)
    budget = len(job.expected[ONE]) + len(job.expected[TWO])
    report = execute(job.plan, job.source, out, destination=destination, disk_budget=budget)
    assert report.shards_resumed == 2
    assert destination.sends == [ONE, TWO, THREE]
    assert destination.content() == job.expected


@pytest.mark.parametrize("pieces", [50, 70, 100])
def test_a_part_that_holds_the_whole_budget_is_finished_first(
    tmp_path: Path, out: Path, destination: FolderDestination, pieces: int
) -> None:
    job = far_job(make_job(tmp_path))
    plan = replace(job.plan, shards=(job.plan.shards[1], job.plan.shards[0]))
    source = FarSource()
    left = iter(range(pieces))

    def on_piece(name: str) -> None:
        if next(left, None) is None:
            raise PublishError(name, "stop here")

    source.on_piece = on_piece
    with pytest.raises(PublishError):
        execute(plan, source, out, destination=destination, workers=1)
    # The other order, and less room than before: who waits must not wait for ever.
    smaller = len(job.expected[TWO])
    execute(
        replace(plan, shards=plan.shards[::-1]),
        FarSource(),
        out,
        destination=destination,
        disk_budget=smaller,
        workers=2,
    )
    assert set(destination.sends) == {ONE, TWO}
    assert destination.content()[TWO] == job.expected[TWO]


def test_a_shard_with_a_receipt_that_is_still_here_is_removed_not_sent(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    fail_at(destination, TWO, lambda: PublishError("hf://me/pruned", "the Hub refused"))
    with pytest.raises(PublishError):
        execute(job.plan, job.source, out, destination=destination, workers=1)
    (out.with_name("OUT.partial") / "files" / ONE).write_bytes(job.expected[ONE])
    destination.on_send = lambda name: None
    execute(job.plan, job.source, out, destination=destination)
    assert destination.sends.count(ONE) == 1
    assert destination.content() == job.expected


def test_who_waits_for_room_hears_of_a_stop() -> None:
    meter = ProgressMeter(Progress(0, 0, 0, 0, 0), None)
    room = DiskBudget(10, 8, meter)
    room.take(2)
    meter.stop()
    with pytest.raises(Stopped):
        room.take(1)
    room.release(1)
    room.take(1)


def test_after_an_error_the_shard_in_hand_is_sent_and_those_that_wait_are_not(
    tmp_path: Path, destination: FolderDestination
) -> None:
    """An error of the caller's own, which no worker has met."""
    begun = threading.Event()
    noted: list[str] = []
    names = ["1", "2", "3"]
    for name in names:
        (tmp_path / name).write_bytes(b"shard")

    meter = ProgressMeter(Progress(0, 0, 0, 0, 0), None)

    def on_send(name: str) -> None:
        begun.set()
        with suppress(Stopped):
            for _ in range(6000):  # until the error is noticed
                meter.check()
                time.sleep(0.01)

    destination.on_send = on_send
    journal = SimpleNamespace(send=lambda name, *_: noted.append(name))
    workdir = SimpleNamespace(files=tmp_path, drop_file=lambda name: None)
    context: Any = SimpleNamespace(meter=meter, journal=journal, workdir=workdir)
    uploader = ShardUploader(destination, context, DiskBudget(100, 15, meter))
    with pytest.raises(ValueError, match="the caller's"), uploader:
        for name in names:
            uploader.put(name, 5)
        assert begun.wait(60)
        raise ValueError("the caller's")
    assert destination.sends == noted == ["1"]


def disk_of(nbytes: int) -> System:
    return replace(portable(), free_space=lambda folder: nbytes)


def test_a_large_budget_needs_no_more_disk_than_the_result(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    total = sum(map(len, job.expected.values()))
    execute(
        job.plan,
        job.source,
        out,
        destination=destination,
        disk_budget=10 * total,
        system=disk_of(total),
    )
    assert destination.content() == job.expected


def test_shards_that_are_finished_already_have_their_part_of_the_budget(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    def listen(progress: Progress) -> None:
        if progress.shards_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=listen)
    finished = len(job.expected[ONE]) + len(job.expected[TWO])

    def send(free: int) -> None:
        execute(
            job.plan,
            job.source,
            out,
            destination=destination,
            disk_budget=finished + 500,
            system=disk_of(free),
        )

    with pytest.raises(OutputWriteError, match=r"disk is too small: .*\(500 bytes\) are needed"):
        send(499)
    send(500)
    assert destination.content() == job.expected


def test_shards_that_were_sent_need_no_disk(
    job: Job, out: Path, destination: FolderDestination
) -> None:
    fail_at(destination, TWO, lambda: PublishError("hf://me/pruned", "the Hub refused"))
    with pytest.raises(PublishError):
        execute(job.plan, job.source, out, destination=destination, workers=1)
    destination.on_send = lambda name: None
    record = read_journal(out.with_name("OUT.partial") / "shardsurgeon.journal")
    assert record is not None and ONE in record.done.sent
    done = {*record.done.sent, *record.done.finished}
    rest = sum(len(data) for name, data in job.expected.items() if name not in done)
    with pytest.raises(OutputWriteError, match=rf"\({rest:,} bytes\) are needed"):
        execute(job.plan, job.source, out, destination=destination, system=disk_of(0))
    execute(job.plan, job.source, out, destination=destination, system=disk_of(rest))
    assert destination.content() == job.expected
