"""Blocks shared with the source: what is asked of the system, counted as disk, and told."""

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import cast

import pytest

from shardsurgeon.errors import OutputWriteError, SourceChangedError
from shardsurgeon.execution import shards
from shardsurgeon.execution.plan import Segment
from shardsurgeon.execution.run import execute, rehearse
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage import files
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.system import System, native, portable
from tests.support.shared_blocks import BLOCK, Clones, make_aligned_job, shared_of
from tests.support.tiny_job import Job, content

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the imitation is POSIX's")

BOTH = pytest.mark.parametrize("real", [native(), portable()], ids=["native", "portable"])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_aligned_job(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


@pytest.fixture(params=[7 * BLOCK + 100, 64 << 20])
def batch_nbytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    nbytes = cast(int, request.param)
    monkeypatch.setattr(shards, "BATCH_NBYTES", nbytes)
    monkeypatch.setattr(files, "BUFFER_NBYTES", 1_000)
    return nbytes


def total(job: Job) -> int:
    return sum(map(len, job.expected.values()))


@BOTH
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.usefixtures("batch_nbytes")
def test_whole_blocks_are_shared_once_and_the_rest_is_copied(
    job: Job, out: Path, workers: int, real: System
) -> None:
    clones = Clones()
    report = execute(job.plan, job.source, out, workers=workers, system=clones.system(real))
    assert content(out) == job.expected
    assert clones.nbytes == report.bytes_shared == shared_of(job.plan) > total(job) // 2
    assert report.bytes_copied == total(job) - report.bytes_shared
    covered: Counter[tuple[str, int]] = Counter()
    for _, _, name, at, nbytes in clones.made:
        covered.update((name, block) for block in range(at, at + nbytes, BLOCK))
    assert set(covered.values()) == {1}
    assert clones.probes == 1
    assert sorted(os.listdir(out.parent)) == ["OUT", "Tiny-MoE", "scores.pt"]


def test_a_cut_between_batches_makes_no_edges(
    job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_NBYTES", 3 * BLOCK + 100)
    clones, written = Clones(), Counter[str]()
    system = clones.system(portable())

    def write_at(file: FileIO, data: memoryview, at: int) -> int:
        written[Path(str(file.name)).name] += 1
        return portable().write_at(file, data, at)

    execute(job.plan, job.source, out, workers=1, system=replace(system, write_at=write_at))
    assert max(nbytes for *_, nbytes in clones.made) == 3 * BLOCK
    # The header, and what the source has behind its last whole block.
    assert written["model-2.safetensors"] == 2
    assert content(out) == job.expected


@pytest.mark.parametrize("system", [portable(), replace(native(), unnamed=portable().unnamed)])
def test_nothing_is_shared_where_that_is_not_known_to_work(
    job: Job, out: Path, system: System
) -> None:
    report = execute(job.plan, job.source, out, system=system)
    assert (report.bytes_shared, report.bytes_copied) == (0, total(job))
    assert content(out) == job.expected


@pytest.mark.parametrize("declined_from", [0, 1, 4])
@pytest.mark.usefixtures("batch_nbytes")
def test_what_is_declined_half_way_is_copied(job: Job, out: Path, declined_from: int) -> None:
    clones = Clones(declined_from)
    report = execute(job.plan, job.source, out, workers=2, system=clones.system(native()))
    assert content(out) == job.expected
    assert len(clones.made) == declined_from < clones.asked
    assert report.bytes_shared == clones.nbytes
    assert report.bytes_copied == total(job) - clones.nbytes


def test_a_call_that_fails_is_declined(job: Job, out: Path) -> None:
    real = Clones().system(native())

    def share(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
        if isinstance(target.name, int):
            return real.share(source, begin, target, at, nbytes)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    report = execute(job.plan, job.source, out, system=replace(real, share=share))
    assert report.bytes_shared == 0
    assert content(out) == job.expected


def test_a_probe_that_fails_is_an_answer(job: Job, out: Path) -> None:
    def unnamed(folder: Path) -> FileIO:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    clones = Clones()
    system = replace(clones.system(native()), unnamed=unnamed)
    assert execute(job.plan, job.source, out, system=system).bytes_shared == 0
    assert content(out) == job.expected
    assert clones.asked == 0


def test_every_device_of_the_source_is_asked_by_itself(job: Job, out: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not os.access(elsewhere, os.W_OK) or elsewhere.stat().st_dev == out.parent.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    shard = out.parent / "Tiny-MoE" / "b.safetensors"
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        far = Path(folder) / "b.safetensors"
        far.write_bytes(shard.read_bytes())
        shard.unlink()
        shard.symlink_to(far)
        source = LocalSource(out.parent / "Tiny-MoE", follow_links=True)
        plan = replace(job.plan, source_files=source.list())
        clones = Clones(devices={out.parent.stat().st_dev})
        report = execute(plan, source, out, system=clones.system(native()))
        assert content(out) == job.expected
        assert clones.probes == 2
        assert {name for name, *_ in clones.made} == {"a.safetensors", "tokenizer.json"}
        assert 0 < report.bytes_shared < shared_of(plan)


def test_space_is_needed_for_what_is_written_only(job: Job, out: Path) -> None:
    needed = total(job) - shared_of(job.plan)
    before = sorted(out.parent.rglob("*"))

    def with_room(nbytes: int) -> System:
        return replace(Clones().system(native()), free_space=lambda folder: nbytes)

    assert rehearse(job.plan, job.source, out, system=with_room(5)).needed == needed
    assert sorted(out.parent.rglob("*")) == before
    with pytest.raises(OutputWriteError, match=rf"{needed:,} bytes\) are needed"):
        execute(job.plan, job.source, out, system=with_room(needed - 1))
    execute(job.plan, job.source, out, system=with_room(needed))
    assert content(out) == job.expected


def test_only_what_is_copied_at_length_is_claimed(tmp_path: Path, out: Path) -> None:
    job = make_aligned_job(tmp_path, scale=20)
    claimed: dict[str, list[tuple[int, int]]] = {}

    def reserve(file: FileIO, begin: int, end: int) -> None:
        name = Path(str(file.name)).name
        claimed.setdefault(name, []).append((begin, end))
        size = os.fstat(file.fileno()).st_size
        assert name != "model-1.safetensors" or size == len(job.expected[name])

    execute(job.plan, job.source, out, system=replace(Clones().system(native()), reserve=reserve))
    # The tensor that lies otherwise in its blocks, from the last shared one before it on.
    end = len(job.expected["model-1.safetensors"])
    begin = 64 + (12 * BLOCK * 20 + 1_000) + 8 + 6 * BLOCK * 20
    assert claimed["model-1.safetensors"] == [(begin // BLOCK * BLOCK, end)]
    assert "model-2.safetensors" not in claimed
    claimed.clear()
    other = out.with_name("OUT2")
    execute(job.plan, job.source, other, system=replace(native(), reserve=reserve))
    assert claimed["model-1.safetensors"] == [(0, end)]


def test_the_disk_of_shared_blocks_does_not_come_free(tmp_path: Path) -> None:
    system = replace(native(), free_space=lambda folder: 0, shared=lambda file: 3 * BLOCK)
    place = WorkDir(tmp_path / "OUT", system)
    place.writing.mkdir(parents=True)
    for name, blocks in (("one", 10), ("two", 2)):
        with (place.writing / name).open("wb") as file:
            file.write(os.urandom(blocks * BLOCK))
            os.fsync(file.fileno())
    held = (place.writing / "one").stat().st_blocks * 512
    assert place.space() == held - 3 * BLOCK


def at_edges(file: FileIO, data: memoryview, at: int) -> bool:
    return "model-2" in str(file.name) and len(data) < BLOCK


def test_a_disk_that_fills_up_at_an_edge_is_told_and_the_next_run_goes_on(
    job: Job, out: Path
) -> None:
    def write_at(file: FileIO, data: memoryview, at: int) -> int:
        if at_edges(file, data, at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return native().write_at(file, data, at)

    system = replace(Clones().system(native()), write_at=write_at)
    with pytest.raises(OutputWriteError, match=r"model-2\.saf.*No space left .*free some"):
        execute(job.plan, job.source, out, workers=1, system=system)
    assert not out.exists() and not list(out.with_name("OUT.partial").rglob("writing"))
    clones = Clones()
    report = execute(job.plan, job.source, out, system=clones.system(native()))
    done = len(job.expected["model-1.safetensors"])
    assert (report.bytes_resumed, report.shards_resumed) == (done, 1)
    assert report.bytes_copied + report.bytes_shared == total(job) - done
    assert report.bytes_shared == clones.nbytes > 0
    assert content(out) == job.expected


@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_be_finished_where_blocks_are_shared_or_not(
    job: Job, out: Path, first: bool
) -> None:
    def listen(progress: Progress) -> None:
        if progress.shards_done == 1:
            raise KeyboardInterrupt

    systems = [portable(), Clones().system(native())]
    if first:
        systems.reverse()
    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=listen, system=systems[0])
    assert execute(job.plan, job.source, out, system=systems[1]).shards_resumed == 1
    assert content(out) == job.expected


def test_progress_counts_shared_bytes(job: Job, out: Path) -> None:
    steps: list[Progress] = []
    system = Clones().system(native())
    execute(job.plan, job.source, out, on_progress=steps.append, system=system)
    assert steps[-1].done == steps[-1].total == total(job)


def test_a_source_that_changes_while_blocks_are_shared_is_told(job: Job, out: Path) -> None:
    clones = Clones()
    real = clones.system(native())
    path = job.source.local_path("a.safetensors")
    assert path is not None

    def share(source: FileIO, begin: int, target: FileIO, at: int, nbytes: int) -> bool:
        if "a.safetensors" in str(source.name) and not isinstance(target.name, int):
            os.utime(path, ns=(1, 1))
        return real.share(source, begin, target, at, nbytes)

    with pytest.raises(SourceChangedError, match=r"a\.safetensors: was written to or replaced"):
        execute(job.plan, job.source, out, system=replace(real, share=share))


def test_edges_are_fetched_before_the_first_is_read(job: Job, out: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    plan = replace(job.plan, shards=job.plan.shards[:1], copied_files=())
    real = Clones().system(portable())

    def logged(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def log(file: FileIO, *where: object) -> object:
            if "a.safetensors" in str(file.name):
                begin, end = (where[1], where[1] + len(where[0])) if name == "read" else where  # type: ignore
                calls.append((name, begin, end))
            return call(file, *where)

        return log

    system = replace(
        real,
        read_at=logged("read", real.read_at),  # type: ignore[arg-type]
        will_need=logged("need", real.will_need),  # type: ignore[arg-type]
    )
    execute(plan, job.source, out, workers=1, system=system)
    run = next(iter(plan.shards[0].pieces))
    assert isinstance(run, Segment)
    edges = [(run.begin, BLOCK), (12 * BLOCK, 12 * BLOCK + 64 + 1_000)]
    assert [call for call in calls if call[0] == "need"] == [("need", *edge) for edge in edges]
    reads = [call for call in calls if call[0] == "read"]
    assert [("read", *edge) for edge in edges] == [r for r in reads if (r[1], r[2]) in edges]
    assert calls.index(("need", *edges[1])) < calls.index(("read", *edges[0]))
