"""A plan carried out: the bytes it makes, whatever the workers, the system calls and the faults."""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.errors import (
    OutputError,
    OutputWriteError,
    ShardSurgeonError,
    SourceChangedError,
    SourceReadError,
    UsageError,
    VerificationError,
)
from shardsurgeon.execution import shards
from shardsurgeon.execution.run import execute
from shardsurgeon.execution.workdir import WorkDir
from shardsurgeon.execution.workers import Progress
from shardsurgeon.storage import files
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.storage.system import System, native, portable
from tests.support.tiny_job import SIDE, A, B, Job, content, make_job, shard

BOTH = pytest.mark.parametrize("system", [native(), portable()], ids=["native", "portable"])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "OUT"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tiny shards take as many batches and buffers as big ones."""
    monkeypatch.setattr(shards, "BATCH_NBYTES", 5_000)
    monkeypatch.setattr(files, "BUFFER_NBYTES", 2_000)


def no_room(system: System) -> System:
    return replace(system, free_space=lambda folder: 1_000)


@BOTH
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.usefixtures("small_pieces")
def test_the_bytes_are_the_plans_for_any_number_of_workers(
    job: Job, out: Path, workers: int, system: System
) -> None:
    report = execute(job.plan, job.source, out, workers=workers, system=system)
    assert content(out) == job.expected
    assert sorted(os.listdir(out.parent)) == ["OUT", "Tiny-MoE", "scores.pt"]
    assert report.bytes_copied + report.bytes_shared == sum(map(len, job.expected.values()))
    assert (report.bytes_resumed, report.shards, report.shards_resumed) == (0, 3, 0)


@pytest.mark.usefixtures("small_pieces")
def test_a_source_without_local_files_gives_the_same_bytes(job: Job, out: Path) -> None:
    source = MemorySource({"a.safetensors": A, "b.safetensors": B, **SIDE})
    execute(replace(job.plan, source_files=source.list()), source, out, workers=2)
    assert content(out) == job.expected


@BOTH
def test_short_reads_and_writes_give_the_same_bytes(job: Job, out: Path, system: System) -> None:
    short = replace(
        portable(),
        read_at=lambda file, buffer, at: system.read_at(file, buffer[:3], at),
        write_at=lambda file, data, at: system.write_at(file, data[:1000], at),
        kernel_copy=lambda s, begin, t, at, nbytes: system.kernel_copy(
            s, begin, t, at, min(7, nbytes)
        ),
    )
    execute(job.plan, job.source, out, workers=2, system=short)
    assert content(out) == job.expected


def test_two_workers_begin_with_a_shard_each(
    job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_NBYTES", 1000)
    both, begun, system = threading.Barrier(2, timeout=30), threading.local(), portable()
    first: list[str] = []

    def write_at(file: FileIO, data: memoryview, at: int) -> int:
        name = Path(str(file.name)).name
        if name.endswith(".safetensors") and not hasattr(begun, "yes"):
            begun.yes = True
            first.append(name)
            both.wait()
        return system.write_at(file, data, at)

    execute(job.plan, job.source, out, workers=2, system=replace(system, write_at=write_at))
    assert set(first) == {"model-1.safetensors", "model-2.safetensors"}
    assert content(out) == job.expected


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_scripts_stay_executable_and_the_rest_is_not(job: Job, out: Path) -> None:
    execute(job.plan, job.source, out)
    assert (out / "code" / "model.py").stat().st_mode & 0o100
    assert not (out / "tokenizer.json").stat().st_mode & 0o111


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_nobody_reads_a_result_who_could_not_read_what_it_was_made_of(job: Job, out: Path) -> None:
    model, scores = out.with_name("Tiny-MoE"), out.with_name("scores.pt")
    for path in (model / "b.safetensors", model / "tokenizer.json", scores):
        path.chmod(0o600)
    source = LocalSource(model)
    execute(replace(job.plan, source_files=source.list()), source, out)
    hidden = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    hidden = {name for name in hidden if not (out / name).stat().st_mode & 0o077}
    # The first two shards hold bytes of b.safetensors.
    shards = {"model-1.safetensors", "model-2.safetensors"}
    assert hidden == {*shards, "tokenizer.json", "calibration/scores.pt"}


@pytest.mark.usefixtures("small_pieces")
def test_progress_grows_from_nothing_to_everything(job: Job, out: Path) -> None:
    steps: list[Progress] = []
    execute(job.plan, job.source, out, workers=3, on_progress=steps.append)
    total = sum(map(len, job.expected.values()))
    assert steps[0] == Progress(0, total, 0, 0, 3)
    assert steps[-1] == Progress(total, total, 0, 3, 3)
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_every_shard_is_reserved_before_the_first_byte_is_copied(job: Job, out: Path) -> None:
    calls: list[str] = []
    real = portable()

    def reserve(file: FileIO, begin: int, end: int) -> None:
        calls.append(f"reserve {begin} to {end}")
        real.reserve(file, begin, end)

    def write_at(file: FileIO, data: memoryview, at: int) -> int:
        if "safetensors" in str(file.name):
            calls.append("write")
        return real.write_at(file, data, at)

    execute(job.plan, job.source, out, system=replace(real, reserve=reserve, write_at=write_at))
    sizes = [len(job.expected[shard.file]) for shard in job.plan.shards]
    assert calls[:4] == [f"reserve 0 to {size}" for size in sizes] + ["write"]


def test_a_shard_is_synced_then_named_then_journalled(job: Job, out: Path) -> None:
    calls: list[str] = []
    real = portable()

    def sync_file(file: FileIO) -> None:
        calls.append(f"sync {Path(str(file.name)).name}")

    def rename(old: Path, new: Path) -> None:
        calls.append(f"name {new.name}")
        real.rename(old, new)

    system = replace(real, sync_file=sync_file, rename=rename)
    execute(job.plan, job.source, out, workers=1, system=system)
    begin = calls.index("sync model-1.safetensors")
    assert calls[begin : begin + 3] == [
        "sync model-1.safetensors",
        "name model-1.safetensors",
        "sync shardsurgeon.journal",
    ]
    assert calls[-3:] == ["sync config.json", "name config.json", "name OUT"]


def failing(code: int, when: Callable[..., bool], real: Callable[..., int]) -> Callable[..., int]:
    def call(*arguments: object) -> int:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    return call


def in_second_shard(file: FileIO, *_: object) -> bool:
    return "model-2" in str(file.name)


def in_source_b(file: FileIO, *_: object) -> bool:
    return "b.safetensors" in str(file.name)


FAULTS = [
    ("write_at", errno.ENOSPC, in_second_shard, OutputWriteError, "No space left .*free some"),
    ("write_at", errno.EDQUOT, in_second_shard, OutputWriteError, r"model-2\.saf.*quota"),
    ("sync_file", errno.EIO, in_second_shard, OutputWriteError, r"model-2\.saf.*Input/output"),
    ("reserve", errno.ENOSPC, in_second_shard, OutputWriteError, r"model-2\.saf.*No space left"),
    ("read_at", errno.EIO, in_source_b, SourceReadError, r"b\.safetensors: .*Input/output"),
]


@pytest.mark.parametrize(("call", "code", "when", "error", "said"), FAULTS)
@pytest.mark.usefixtures("small_pieces")
def test_a_fault_is_told_once_and_the_next_run_goes_on(
    job: Job,
    out: Path,
    call: str,
    code: int,
    when: Callable[..., bool],
    error: type[ShardSurgeonError],
    said: str,
) -> None:
    faulty = failing(code, when, getattr(portable(), call))
    system = replace(portable(), **{call: faulty})  # type: ignore[arg-type]
    with pytest.raises(error, match=said):
        execute(job.plan, job.source, out, workers=3, system=system)
    assert not out.exists()
    partial = out.with_name("OUT.partial")
    assert not list(partial.rglob("writing"))  # the disk is not left full
    execute(job.plan, job.source, out, workers=3)
    assert content(out) == job.expected
    assert not partial.exists()


def test_a_finished_shard_is_not_copied_again(job: Job, out: Path) -> None:
    system = replace(portable(), read_at=failing(errno.EIO, in_source_b, portable().read_at))
    plan = replace(job.plan, shards=job.plan.shards[::-1])
    with pytest.raises(SourceReadError):
        execute(plan, job.source, out, workers=1, system=system)
    steps: list[Progress] = []
    begun = time.monotonic()
    report = execute(plan, job.source, out, workers=1, on_progress=steps.append)
    assert 0 <= report.seconds <= time.monotonic() - begun
    assert (report.bytes_resumed, report.shards_resumed) == (11, 1)
    assert (steps[0].done, steps[0].resumed, steps[0].shards_done) == (11, 11, 1)
    assert content(out) == job.expected


def test_a_full_disk_is_found_before_the_first_byte_with_both_numbers(job: Job, out: Path) -> None:
    needed = sum(map(len, job.expected.values()))
    with pytest.raises(
        OutputWriteError, match=rf"disk is too small: .*{needed:,} bytes.*1,000 bytes"
    ):
        execute(job.plan, job.source, out, system=no_room(native()))
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "scores.pt"]


def interrupt(job: Job, out: Path, shards: int) -> None:
    """Stop with Ctrl-C once that many shards are finished."""

    def listen(progress: Progress) -> None:
        if progress.shards_done == shards:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job.plan, job.source, out, workers=1, on_progress=listen)


def test_what_is_finished_needs_no_space(job: Job, out: Path) -> None:
    interrupt(job, out, shards=1)
    total, done = sum(map(len, job.expected.values())), len(job.expected["model-1.safetensors"])
    one_short = replace(native(), free_space=lambda folder: total - done - 1)
    with pytest.raises(OutputWriteError, match=rf" \({total - done:,} bytes\) are needed"):
        execute(job.plan, job.source, out, system=one_short)
    with pytest.raises(OutputWriteError, match=rf" \({total:,} bytes\) are needed"):
        execute(job.plan, job.source, out, restart=True, system=one_short)


@pytest.mark.parametrize("shards", [0, 1, 2, 3])
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(job: Job, out: Path, shards: int) -> None:
    before = threading.active_count()
    interrupt(job, out, shards)
    assert threading.active_count() == before
    assert not out.exists()
    report = execute(job.plan, job.source, out)
    assert report.shards_resumed == shards
    assert content(out) == job.expected


def test_a_finished_shard_that_was_damaged_since_is_made_again(job: Job, out: Path) -> None:
    interrupt(job, out, shards=2)
    files = out.with_name("OUT.partial") / "files"
    os.truncate(files / "model-1.safetensors", 10)
    (files / "model-2.safetensors").unlink()
    assert execute(job.plan, job.source, out).shards_resumed == 0
    assert content(out) == job.expected


def test_another_command_or_source_is_refused_until_it_restarts(job: Job, out: Path) -> None:
    interrupt(job, out, shards=2)
    changed = replace(job.plan, source_fingerprint="3" * 64)
    with pytest.raises(OutputError, match=r"source changed since .*--restart starts over"):
        execute(changed, job.source, out)
    other = replace(job.plan, asked=(("selection", "keep"),), shards=job.plan.shards[1:])
    with pytest.raises(OutputError, match=r"a different command .*--restart starts over"):
        execute(other, job.source, out)
    assert execute(other, job.source, out, restart=True).shards_resumed == 0
    assert content(out).keys() == job.expected.keys() - {"model-1.safetensors"}


def test_the_whole_result_is_shown_before_it_becomes_out_and_may_be_refused(
    job: Job, out: Path
) -> None:
    seen: list[Path] = []

    def refuse(folder: Path) -> None:
        assert content(folder) == job.expected
        assert not out.exists()
        seen.append(folder)
        raise VerificationError(folder, "does not hold")

    for _ in range(2):
        with pytest.raises(VerificationError):
            execute(job.plan, job.source, out, before_delivery=refuse)
    execute(job.plan, job.source, out, before_delivery=seen.append)
    assert seen == [out.with_name("OUT.partial") / "files"] * 3
    assert content(out) == job.expected


def test_a_result_that_does_not_hold_because_its_source_changed_meanwhile_says_so(
    job: Job, out: Path
) -> None:
    def change_and_refuse(folder: Path) -> None:
        (out.with_name("Tiny-MoE") / "a.safetensors").write_bytes(A[:-1])
        raise VerificationError(folder, "does not hold")

    with pytest.raises(SourceChangedError, match=r"a\.safetensors"):
        execute(job.plan, job.source, out, before_delivery=change_and_refuse)
    assert not out.exists()


def test_a_source_that_changed_since_it_was_planned_is_named(job: Job, out: Path) -> None:
    path = job.source.local_path("b.safetensors")
    assert path is not None
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceChangedError, match=r"b\.safetensors: was written to or replaced"):
        execute(job.plan, job.source, out)
    path.write_bytes(B[:-1])
    with pytest.raises(SourceChangedError, match=r"had 40,000 bytes .* has 39,999"):
        execute(job.plan, job.source, out)
    path.unlink()
    with pytest.raises(SourceChangedError, match=r"b\.safetensors: .*gone now"):
        execute(job.plan, job.source, out)
    assert sorted(os.listdir(out.parent)) == ["Tiny-MoE", "scores.pt"]


def test_a_score_file_that_changed_since_it_was_read_is_never_delivered(
    job: Job, out: Path
) -> None:
    scores = out.parent / "scores.pt"
    scores.write_bytes(b"SCORES")
    with pytest.raises(SourceChangedError, match=r"scores\.pt: had SHA-256 .* has") as refused:
        execute(job.plan, job.source, out)
    assert refused.value.exit_status == 1
    assert not out.with_name("OUT.partial").joinpath("files").exists()
    scores.write_bytes(b"scores")

    def listen(progress: Progress) -> None:
        if progress.shards_done == 3:
            scores.write_bytes(b"SCORES")

    with pytest.raises(SourceChangedError, match=r"scores\.pt: had SHA-256"):
        execute(job.plan, job.source, out, workers=1, on_progress=listen)
    assert not out.exists()
    scores.write_bytes(b"scores")
    execute(job.plan, job.source, out)
    assert content(out) == job.expected


def _replace_in_place(path: Path) -> None:
    path.write_bytes(B[::-1])
    os.utime(path, ns=(1, 1))


def _cut_short(path: Path) -> None:
    os.truncate(path, 500)


@pytest.mark.parametrize("change", [_replace_in_place, _cut_short])
@BOTH
def test_a_source_that_changes_while_it_is_read_never_becomes_a_shard(
    job: Job, out: Path, change: Callable[[Path], None], system: System
) -> None:
    path = job.source.local_path("b.safetensors")
    assert path is not None

    def listen(progress: Progress) -> None:
        if progress.shards_done == 1 and path.stat().st_mtime_ns != 1:
            change(path)

    with pytest.raises((SourceChangedError, SourceReadError), match=r"b\.safetensors"):
        execute(job.plan, job.source, out, workers=1, on_progress=listen, system=system)
    assert not out.exists()
    assert set(content(out.with_name("OUT.partial") / "files")) == {"model-1.safetensors"}


def test_a_second_run_on_the_same_out_is_refused(job: Job, out: Path) -> None:
    refusals: list[str] = []

    def listen(progress: Progress) -> None:
        with pytest.raises(OutputError) as caught:
            execute(job.plan, job.source, out)
        refusals.append(str(caught.value))

    execute(job.plan, job.source, out, on_progress=listen)
    assert "another run writes there now" in refusals[0]
    assert content(out) == job.expected


def test_a_run_whose_result_is_there_is_done_and_checked_again(job: Job, out: Path) -> None:
    first = execute(job.plan, job.source, out)
    before = {path: path.stat() for path in out.rglob("*")}
    checked: list[Path] = []
    again = execute(job.plan, job.source, out, before_delivery=checked.append)
    assert (again.bytes_copied, again.bytes_resumed) == (0, first.bytes_copied + first.bytes_shared)
    assert checked == [out]
    after = {path: path.stat() for path in out.rglob("*")}
    assert [(path, each.st_mtime_ns) for path, each in after.items()] == [
        (path, each.st_mtime_ns) for path, each in before.items()
    ]
    assert not Path(f"{out}.partial").exists()


def test_what_a_kill_after_the_last_rename_left_goes_with_the_next_run(
    job: Job, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(WorkDir, "clean_up", lambda self: None)
        execute(job.plan, job.source, out)
    assert Path(f"{out}.partial", "shardsurgeon.journal").exists()
    execute(job.plan, job.source, out)
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("what", ["shard", "header", "generated", "score file", "missing"])
def test_a_result_that_is_not_whole_is_no_result(job: Job, out: Path, what: str) -> None:
    execute(job.plan, job.source, out)
    names = {
        "generated": job.plan.generated_files[0][0],
        "score file": job.plan.score_files[0][0],
        "missing": job.plan.copied_files[0],
    }
    path = out / names.get(what, job.plan.shards[0].file)
    if what == "missing":
        path.unlink()
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] if what == "shard" else b"X" + raw[1:])
    with pytest.raises(OutputError, match="exists"):
        execute(job.plan, job.source, out)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/../../x", "/x.safetensors", ""])
def test_a_plan_whose_files_leave_the_folder_is_refused(job: Job, out: Path, name: str) -> None:
    nameless = shard(name, b"")
    with pytest.raises(OutputError, match="leads out of the output folder"):
        execute(replace(job.plan, shards=(nameless,)), job.source, out)
    with pytest.raises(OutputError, match="leads out of the output folder"):
        execute(replace(job.plan, generated_files=((name, b""),)), job.source, out)


def test_two_files_of_one_name_are_refused(job: Job, out: Path) -> None:
    with pytest.raises(OutputError, match=r"tokenizer\.json: is the name of two output files"):
        execute(replace(job.plan, generated_files=(("tokenizer.json", b""),)), job.source, out)


def test_fewer_than_no_workers_are_refused(job: Job, out: Path) -> None:
    with pytest.raises(UsageError, match="--workers"):
        execute(job.plan, job.source, out, workers=-1)


def test_a_bug_in_a_listener_keeps_its_own_type(job: Job, out: Path) -> None:
    def listen(progress: Progress) -> None:
        if progress.done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(job.plan, job.source, out, on_progress=listen)
