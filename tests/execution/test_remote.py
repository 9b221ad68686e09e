"""A plan carried out over a network: as few bytes as can be, and never twice what was noted."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import NetworkError, OutputError, SourceChangedError
from shardsurgeon.execution import shards as module
from shardsurgeon.execution.plan import Literal, Segment
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage.system import portable
from tests.support.far_source import FILES, FarSource, far_job, noted
from tests.support.tiny_job import SIDE, A, Job, content, make_job, shard, tensor, tensors_of

# What tiny_job's plan wants: 30,001 + 5 bytes, then 39,000 + 9,000; the side files.
SHARDS_WANTED = 30_006 + 48_000
SIDE_WANTED = sum(map(len, SIDE.values()))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMOTE_BATCH_NBYTES", 5_000)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return far_job(make_job(tmp_path))


@pytest.fixture
def source(job: Job) -> FarSource:
    assert isinstance(job.source, FarSource)
    return job.source


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


def fail_after(source: FarSource, pieces: int, error: Callable[[str], BaseException]) -> None:
    """Let so many pieces through, then raise."""
    left = iter(range(pieces))

    def on_piece(name: str) -> None:
        if next(left, None) is None:
            raise error(name)

    source.on_piece = on_piece


def gave_up(name: str) -> NetworkError:
    return NetworkError(name, "the network gave up")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_bytes_are_the_plans_and_travel_once(
    job: Job, source: FarSource, out: Path, workers: int
) -> None:
    report = execute(job.plan, source, out, workers=workers)
    assert content(out) == job.expected
    assert report.bytes_downloaded == source.nbytes == SHARDS_WANTED + SIDE_WANTED
    assert sorted(os.listdir(out.parent)) == ["OUT", "Tiny-MoE", "scores.pt"]


def test_eight_ranges_are_in_flight_at_once(job: Job, source: FarSource, out: Path) -> None:
    together = threading.Barrier(8)
    met: set[int] = set()

    def on_piece(name: str) -> None:
        if threading.get_ident() not in met and len(met) < 8:
            met.add(threading.get_ident())
            together.wait(timeout=30)

    source.on_piece = on_piece
    execute(replace(job.plan, copied_files=()), source, out)
    assert len(met) == 8


def test_the_source_is_not_listed_for_every_shard(job: Job, source: FarSource, out: Path) -> None:
    before = source.lists
    execute(job.plan, source, out)
    assert source.lists == before + 2


_kept = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 700)), min_size=1, max_size=60)


@given(st.lists(_kept, min_size=1, max_size=3), st.sampled_from([500, 5_000, 100_000]))
@settings(max_examples=25, deadline=None)
def test_at_most_a_hundredth_more_than_is_wanted_travels(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[tuple[int, int]]], batch: int
) -> None:
    folder = tmp_path_factory.mktemp("job")
    source = FarSource(FILES)
    planned, expected, wanted = [], {}, 0
    for number, kept in enumerate(shards):
        at, pieces, data = 0, [], b"HH"
        for gap, nbytes in kept:
            pieces.append(Segment("a.safetensors", at + gap, nbytes))
            data += A[at + gap : at + gap + nbytes]
            wanted += nbytes
            at += gap + nbytes
        planned.append(shard(f"{number}", b"HH", tensor(*pieces)))
        expected[f"{number}"] = data
    plan = replace(far_job(make_job(folder), source).plan, shards=tuple(planned))
    plan = replace(plan, generated_files=(), copied_files=(), score_files=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REMOTE_BATCH_NBYTES", batch)
        report = execute(plan, source, folder / "OUT", workers=2)
    assert content(folder / "OUT") == expected
    assert wanted <= report.bytes_downloaded == source.nbytes <= wanted * 1.01


def test_narrow_gaps_are_read_over_rather_than_asked_around(job: Job, out: Path) -> None:
    rows = [Segment("a.safetensors", at, 1_990) for at in range(0, 50_000, 2_000)]
    plan = replace(job.plan, shards=(shard("one", b"HH", tensor(*rows)),), copied_files=())
    source = FarSource()
    report = execute(plan, source, out)
    assert len(source.requests) == 13  # 25 rows, two to a batch
    assert report.bytes_downloaded == 25 * 1_990 + 12 * 10


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_cut_at_any_piece_goes_on_from_what_was_noted(
    tmp_path: Path, job: Job, workers: int
) -> None:
    pieces = (SHARDS_WANTED + SIDE_WANTED) // 700
    for cut in range(0, pieces, 5):
        out = tmp_path / f"OUT {cut}"
        first, second = FarSource(), FarSource()
        fail_after(first, cut, gave_up)
        with pytest.raises(NetworkError, match="the network gave up"):
            execute(job.plan, first, out, workers=workers)
        assert not out.exists()
        done = noted(out)
        # All but the batches that were in hand.
        assert first.nbytes - done <= workers * 5_000 + SIDE_WANTED
        steps: list[Progress] = []
        report = execute(job.plan, second, out, workers=workers, on_progress=steps.append)
        assert content(out) == job.expected
        headers = sum(len(each.header) for each in job.plan.shards)
        assert second.nbytes <= SHARDS_WANTED + SIDE_WANTED + headers + 10 - done
        assert report.bytes_resumed == done == steps[0].done == steps[0].resumed
        assert report.bytes_copied == sum(map(len, job.expected.values())) - done
        assert steps[-1].done == steps[-1].total


def test_many_cuts_in_a_row_cost_no_byte_that_was_noted(job: Job, out: Path) -> None:
    source, travelled = FarSource(), 0
    for _ in range(60):
        done = noted(out)
        source.nbytes = 0
        fail_after(source, 12, gave_up)
        try:
            execute(job.plan, source, out, workers=1)
            break
        except NetworkError:
            travelled += source.nbytes
            assert source.nbytes - (noted(out) - done) <= 5_000 + SIDE_WANTED
    assert content(out) == job.expected


@pytest.mark.parametrize("shards", [0, 1, 2, 3])
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(job: Job, out: Path, shards: int) -> None:
    def listen(progress: Progress) -> None:
        if progress.shards_done == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, on_progress=listen)
    assert not out.exists()
    execute(job.plan, job.source, out)
    assert content(out) == job.expected


def test_bytes_are_on_the_disk_before_the_journal_speaks_of_them(
    job: Job, source: FarSource, out: Path
) -> None:
    calls: list[str] = []
    real = portable()

    def sync_file(file: FileIO) -> None:
        calls.append(f"sync {Path(str(file.name)).name}")

    def write_at(file: FileIO, data: memoryview, at: int) -> int:
        kind = "journal" if b"filled" in bytes(data[:20]) else Path(str(file.name)).name
        if calls[-1:] != [f"write {kind}"]:
            calls.append(f"write {kind}")
        return real.write_at(file, data, at)

    system = replace(real, sync_file=sync_file, write_at=write_at)
    execute(job.plan, source, out, workers=1, system=system)
    notes = [number for number, call in enumerate(calls) if call == "write journal"]
    assert len(notes) > 10
    for number in notes:
        written, synced = calls[number - 2 : number]
        assert written.removeprefix("write ") == synced.removeprefix("sync ")
        assert calls[number + 1] == "sync shardsurgeon.journal"


def cut_once(job: Job, out: Path, pieces: int = 80) -> int:
    """Leave a run behind whose second shard is there in part; how many bytes were noted."""
    source = FarSource()
    fail_after(source, pieces, gave_up)
    with pytest.raises(NetworkError):
        execute(job.plan, source, out, workers=1)
    return noted(out)


def test_only_what_the_journal_speaks_of_stays_after_a_failure(job: Job, out: Path) -> None:
    cut_once(job, out)
    partial = out.with_name("OUT.partial")
    assert set(content(partial / "writing")) == {"model-2.safetensors"}
    assert set(content(partial / "files")) == {"model-1.safetensors"}


def test_nothing_stays_where_nothing_has_come(job: Job, source: FarSource, out: Path) -> None:
    fail_after(source, 0, gave_up)
    with pytest.raises(NetworkError):
        execute(replace(job.plan, shards=job.plan.shards[1:2]), source, out, workers=1)
    # The header needs no network.
    assert noted(out) <= 72


@pytest.mark.parametrize("change", ["removed", "shortened"])
def test_a_part_that_is_not_as_it_was_left_is_fetched_anew(
    job: Job, out: Path, change: str
) -> None:
    assert cut_once(job, out) > 40_000
    part = out.with_name("OUT.partial") / "writing" / "model-2.safetensors"
    if change == "removed":
        part.unlink()
    else:
        os.truncate(part, 20_000)
    cut_once(job, out, pieces=3)  # what the journal said of the old file holds no longer
    assert execute(job.plan, FarSource(), out).bytes_resumed < 40_000
    assert content(out) == job.expected


def test_a_part_of_another_layout_is_not_gone_on_with(job: Job, out: Path) -> None:
    cut_once(job, out)
    one, two, three = job.plan.shards
    other = shard(two.file, b"9" * 72, *reversed(list(tensors_of(two))))
    plan = replace(job.plan, shards=(one, other, three))
    with pytest.raises(OutputError, match=r"would write other bytes .*--restart"):
        execute(plan, FarSource(), out)
    execute(plan, FarSource(), out, restart=True)
    data = job.expected["model-2.safetensors"][72:]
    assert (out / other.file).read_bytes() == b"9" * 72 + data[39_000:] + data[:39_000]


def test_a_restart_throws_parts_away(job: Job, out: Path) -> None:
    cut_once(job, out)
    report = execute(job.plan, FarSource(), out, restart=True)
    assert (report.bytes_resumed, report.bytes_downloaded) == (0, SHARDS_WANTED + SIDE_WANTED)
    assert content(out) == job.expected


def test_a_kill_between_a_shards_name_and_its_note_costs_no_byte(job: Job, out: Path) -> None:
    cut_once(job, out)
    journal = out.with_name("OUT.partial") / "shardsurgeon.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b'{"finished"' not in line))
    source = FarSource()
    assert execute(job.plan, source, out).shards_resumed == 1
    assert not any(name == "a.safetensors" and begin >= 100 for name, begin, _ in source.requests)
    assert content(out) == job.expected


def test_parts_need_no_space_twice(job: Job, out: Path) -> None:
    done = cut_once(job, out)
    total = sum(map(len, job.expected.values()))
    whole = len(job.expected["model-1.safetensors"])
    assert whole < done < total
    # What the part takes counts as free, as it does where the part is worthless.
    system = replace(portable(), free_space=lambda folder: total - whole - 48_000)
    execute(job.plan, FarSource(), out, system=system)
    assert content(out) == job.expected


def test_a_file_that_is_another_by_now_never_becomes_a_shard(
    job: Job, source: FarSource, out: Path
) -> None:
    def changed(name: str) -> SourceChangedError:
        return SourceChangedError(f"far/{name}", "had etag 1, has 2")

    fail_after(source, 60, changed)
    with pytest.raises(SourceChangedError, match="had etag 1, has 2"):
        execute(job.plan, source, out, workers=2)
    assert not out.exists()


def test_files_that_lie_in_a_local_cache_do_not_travel(tmp_path: Path, out: Path) -> None:
    model = tmp_path / "Tiny-MoE"
    local = make_job(tmp_path)

    class HalfCached(FarSource):
        def local_path(self, name: str) -> Path | None:
            return model / name if name == "a.safetensors" else None

    job = far_job(local, HalfCached())
    report = execute(job.plan, job.source, out)
    assert content(out) == job.expected
    assert report.bytes_downloaded == 39_000 + 5 + SIDE_WANTED


def test_a_shard_of_literals_needs_no_network(job: Job, out: Path) -> None:
    only = shard("one", b"HH", tensor(Literal(b"xyz")))
    source = FarSource()
    execute(replace(job.plan, shards=(only,), copied_files=()), source, out)
    assert (out / "one").read_bytes() == b"HHxyz"
    assert source.requests == []


def test_a_commit_that_is_no_longer_the_newest_can_be_named_to_go_on(job: Job, out: Path) -> None:
    def pin(commit: str) -> None:
        source.location, source.revision = f"hf://org/name@{commit[:12]}", commit

    source = FarSource()
    pin("a" * 40)
    fail_after(source, 40, gave_up)
    with pytest.raises(NetworkError):
        execute(job.plan, source, out, workers=1)
    pin("b" * 40)
    newer = replace(job.plan, source_fingerprint="b" * 64)
    with pytest.raises(OutputError, match=f"--model hf://org/name@{'a' * 40} goes on with it"):
        execute(newer, source, out)


@pytest.mark.parametrize(("nbytes", "requests"), [(50, 1), (49, 2)])
def test_a_gap_of_a_hundredth_is_read_over_and_a_wider_one_is_not(
    job: Job, source: FarSource, out: Path, nbytes: int, requests: int
) -> None:
    pieces = Segment("a.safetensors", 0, 50), Segment("a.safetensors", 51, nbytes)
    # What the plan itself holds does not travel.
    first = shard("model-1.safetensors", b"1" * 64, tensor(*pieces, Literal(b"x" * 99)))
    execute(replace(job.plan, shards=(first,), copied_files=()), source, out)
    assert len(source.requests) == requests
    written = (out / "model-1.safetensors").read_bytes()
    assert written == b"1" * 64 + A[:50] + A[51 : 51 + nbytes] + b"x" * 99
