"""What lies prepared where we write, and a disk that is full at every single call.

Links, pipes, devices and mounts in every place of OUT.partial and at every -o: nothing outside is
written, nothing that is there already is lost, and no command takes a minute.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.catalogue import EVERY_CALL, Entry, spread
from tests.faults.streams import Case, cases
from tests.faults.trial import Bench, Ended, Lost, contents

PRECIOUS = b"somebody's only copy"


class SmallBench(Bench):
    """A checkpoint that is pruned in a moment, whatever size was asked for."""

    def __init__(self, folder: Path, hidden: int, width: int) -> None:
        super().__init__(folder, hidden=64, width=24)


# What is laid, by name; each gets the place and a folder with a precious file in it.


def _link_to_file(place: Path, precious: Path) -> None:
    place.symlink_to(precious / "file")


def _link_to_folder(place: Path, precious: Path) -> None:
    place.symlink_to(precious)


def _link_to_nowhere(place: Path, precious: Path) -> None:
    place.symlink_to(precious / "made by a link")


def _hard_link(place: Path, precious: Path) -> None:
    place.hardlink_to(precious / "file")


def _pipe(place: Path, precious: Path) -> None:
    os.mkfifo(place)


def _device(place: Path, precious: Path) -> None:
    place.symlink_to("/dev/full")


def _mount(place: Path, precious: Path) -> None:
    """The same disk once more: its number tells nothing, and no rename leads out of it."""
    place.mkdir()
    done = subprocess.run(["mount", "--bind", str(place), str(place)], check=False)
    if done.returncode:
        place.rmdir()
        _link_to_folder(place, precious)  # only root may mount


LAID: list[Callable[[Path, Path], None]] = [
    *(_link_to_file, _link_to_folder, _link_to_nowhere, _hard_link, _pipe, _device, _mount),
]
INSIDE = [
    "",
    "shardsurgeon.lock",
    "shardsurgeon.journal",
    "shardsurgeon.journal.writing",
    "writing",
    "files",
    "writing/model-00001-of-00004.safetensors",
    "files/model-00001-of-00004.safetensors",
    "files/config.json",
    "writing/calibration",
]


def laid_in_partial(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """Something lies in OUT.partial, in place of what an interrupted run left there."""
    pairs = [(place, lay) for place in INSIDE for lay in LAID]
    numbers.shuffle(pairs)
    count = bench.count(calls=EVERY_CALL)
    for name, lay in pairs[:tries]:
        if name:
            bench.run(fault={"calls": EVERY_CALL, "what": "kill", "nth": count * 2 // 3})
        ended = _with_something_laid(
            bench, bench.place / "out.partial" / name, lay, lambda: bench.run_words(bench.words())
        )
        bench.require(ended.status in (0, 1, 2), f"{lay.__name__} at {name!r}", ended)
        bench.require_no_out(ended) if ended.status else None
        bench.require_finishes()
        bench.clear()
        yield ended


def laid_at_output(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """Something lies at -o, or under the name that a temporary file of it might have."""
    made = bench.place / "made"
    made.mkdir()
    commands = [case for case in cases(bench) if case.made and "calibrate" not in case.words]
    pairs = [(case, end, lay) for case in commands for end in ("", ".writing") for lay in LAID]
    numbers.shuffle(pairs)
    for case, end, lay in pairs[:tries]:
        assert case.made is not None
        made.mkdir(exist_ok=True)
        more = ["--force"] if case.made.parent == made else []
        words = [*case.words, *more]
        place = Path(f"{case.made}{end}")
        ended = _with_something_laid(
            bench,
            place,
            lay,
            lambda words=words: bench.run_words(words),  # type: ignore[misc]
        )
        bench.require(ended.status in (0, 1, 2), f"{lay.__name__} at {place.name}", ended)
        _require_made(bench, case)
        bench.clear()
        yield ended


def _with_something_laid(
    bench: Bench, place: Path, lay: Callable[[Path, Path], None], run: Callable[[], Ended]
) -> Ended:
    """How the command ends; what it found is taken away again, and nothing precious changed."""
    precious = bench.place.parent / "precious"
    precious.mkdir()
    (precious / "file").write_bytes(PRECIOUS)
    aside = bench.place.parent / "aside"
    if os.path.lexists(place):
        place.rename(aside)
    place.parent.mkdir(parents=True, exist_ok=True)
    lay(place, precious)
    try:
        ended = run()
        bench.require(
            sorted(path.name for path in precious.iterdir()) == ["file"]
            and (precious / "file").read_bytes() == PRECIOUS,
            f"{lay.__name__} at {place.name}: what is precious changed",
            ended,
        )
        bench.require_source(ended)
    finally:
        subprocess.run(["umount", str(place)], check=False, capture_output=True)
        shutil.rmtree(precious)
    if ended.status or place.suffix == ".writing":
        _take_away(place)
    if aside.exists():
        if ended.status:
            aside.rename(place)
        else:
            _take_away(aside)
    return ended


def _take_away(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _require_made(bench: Bench, case: Case) -> None:
    """The command makes the right thing once nothing is in its way."""
    assert case.made is not None
    if case.made == bench.out:
        shutil.rmtree(bench.place / "made")
        bench.require_finishes()
        return
    if case.made.exists() or case.made.is_symlink():
        _take_away(case.made)
    ended = bench.run_words(case.words)
    bench.require(ended.status == 0 and case.made.is_file(), "the rerun failed", ended)


def full_at_every_call(bench: Bench, tries: int, numbers: random.Random) -> Iterator[Ended]:
    """ENOSPC at this write, reservation or rename and all that follow: each one in turn."""
    made = bench.place / "made"
    made.mkdir()
    for case in [each for each in cases(bench) if each.made and "calibrate" not in each.words]:
        assert case.made is not None
        words = [
            *case.words,
            *(["--workers", "1", "--no-progress"] if case.made == bench.out else []),
        ]
        calls = ["write_at", "reserve", "rename"]
        fault: dict[str, Any] = {"calls": calls, "portable": True, "code": errno.ENOSPC}
        counted = bench.place.parent / "counted"
        made.mkdir(exist_ok=True)
        ended = bench.run_words(words, {**fault, "counted": str(counted)})
        bench.require(ended.status == 0, "the undisturbed run failed", ended)
        count = int(counted.read_text())
        if count == 0:
            raise Lost(f"{words} writes nothing that is counted")
        wanted = contents(case.made) if case.made.is_dir() else case.made.read_bytes()
        bench.clear()
        for nth in range(1, count + 1) if tries > 1 else spread(count, 1, numbers):
            made.mkdir(exist_ok=True)
            ended = bench.run_words(words, {**fault, "what": "error", "nth": nth})
            bench.require_told(ended, {1}, "No space left.*free some space")
            if case.made == bench.out:
                bench.require_no_out(ended)
            else:
                bench.require(not list(made.iterdir()), "something is left", ended)
            bench.require_source(ended)
            ended_again = bench.run_words(words)
            found = contents(case.made) if case.made.is_dir() else case.made.read_bytes()
            bench.require(found == wanted, "the rerun's bytes differ", ended_again)
            left = {path.name for path in bench.place.iterdir()}
            bench.require(left <= {"made", "out"}, f"the rerun left {left}", ended_again)
            bench.clear()
            yield ended
        if tries == 1:
            return


PLACES = [
    Entry("links, pipes, devices and mounts in OUT.partial", laid_in_partial, 70),
    Entry("links, pipes, devices and mounts at every -o", laid_at_output, 56),
    Entry("ENOSPC at every write and rename, one after the other", full_at_every_call, 200),
]
