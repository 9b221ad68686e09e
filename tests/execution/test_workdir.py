"""OUT.partial: who may work there, what is thrown away, and how it becomes OUT."""

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from itertools import product
from pathlib import Path

import pytest

from shardsurgeon.errors import OutputError, OutputWriteError
from shardsurgeon.execution.journal import Run
from shardsurgeon.execution.workdir import WorkDir, lock_workdir
from shardsurgeon.storage.system import native

RUN = Run("1" * 64, "2" * 64, ())


def finish(place: WorkDir, name: str, data: bytes) -> None:
    place.begin_file(name).write_bytes(data)
    place.finish_file(name)


def try_to_hold(out: Path) -> None:
    with lock_workdir(out, native()):
        pass


def interrupted(out: Path) -> Path:
    """Leave OUT.partial as a failed run does that had finished one file of two."""
    with (
        pytest.raises(ZeroDivisionError),
        lock_workdir(out, native()) as place,
        place.open_journal(RUN, restart=False) as journal,
    ):
        finish(place, "sub/one", b"1111")
        journal.finish("sub/one", 4)
        place.begin_file("two").write_bytes(b"half")
        raise ZeroDivisionError
    return place.folder


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_delivered_files_are_out_and_nothing_else_is_left(tmp_path: Path) -> None:
    with lock_workdir(tmp_path / "deep" / "OUT", native()) as place:
        with place.open_journal(RUN, restart=False):
            finish(place, "sub/one", b"1111")
        place.publish({"sub/one"})
    assert tree(tmp_path) == {"deep/OUT/sub/one"}
    assert os.listdir(tmp_path / "deep") == ["OUT"]


def test_a_failed_run_keeps_what_is_finished_and_drops_what_is_half(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "OUT")
    assert folder == tmp_path / "OUT.partial"
    assert tree(folder) == {"files/sub/one", "shardsurgeon.journal", "shardsurgeon.lock"}


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        lock_workdir(tmp_path / "OUT", native()) as place,
        place.open_journal(RUN, restart=False),
    ):
        place.begin_file("one").write_bytes(b"half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_an_interrupted_run_goes_on_and_a_restart_starts_over(tmp_path: Path) -> None:
    interrupted(tmp_path / "OUT")
    with (
        lock_workdir(tmp_path / "OUT", native()) as place,
        place.open_journal(RUN, False) as journal,
    ):
        assert journal.done.finished == {"sub/one": 4}
        assert place.has("sub/one", 4, b"11")
    with (
        lock_workdir(tmp_path / "OUT", native()) as place,
        place.open_journal(RUN, True) as journal,
    ):
        assert journal.done.finished == {}
        assert not place.has("sub/one", 4, b"11")


@pytest.mark.parametrize(("nbytes", "begins"), [(5, b"11"), (4, b"12")])
def test_a_file_of_another_size_or_header_is_not_finished(
    tmp_path: Path, nbytes: int, begins: bytes
) -> None:
    interrupted(tmp_path / "OUT")
    assert not WorkDir(tmp_path / "OUT", native()).has("sub/one", nbytes, begins)
    assert not WorkDir(tmp_path / "OUT", native()).has("missing", nbytes, begins)


def test_the_place_of_another_command_is_refused_untouched(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "OUT")
    (folder / "writing").mkdir()
    (folder / "writing" / "two").write_bytes(b"half")
    before = tree(folder)
    other = Run("9" * 64, "2" * 64, (), asked={"selection": "keep"})
    with (
        pytest.raises(OutputError, match="different command"),
        lock_workdir(tmp_path / "OUT", native()) as place,
    ):
        place.open_journal(other, restart=False)
    assert tree(folder) == before
    with (
        lock_workdir(tmp_path / "OUT", native()) as place,
        place.open_journal(other, True) as journal,
    ):
        assert journal.done.finished == {}


def test_an_existing_out_is_refused_even_where_it_is_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for name in ("folder", "link", "."):
        with pytest.raises(OutputError, match="exists; choose another -o or remove it"):
            try_to_hold(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("content", ["notes.txt", "files/x"])
def test_a_folder_that_is_not_ours_is_never_touched(
    tmp_path: Path, content: str, restart: bool
) -> None:
    path = tmp_path / "OUT.partial" / content
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    with (
        pytest.raises(OutputError, match="was not made by shardsurgeon"),
        lock_workdir(tmp_path / "OUT", native()) as place,
    ):
        place.open_journal(RUN, restart)
    assert tree(tmp_path / "OUT.partial") == {content}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_or_link_in_the_way_is_not_ours_either(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "OUT.partial").write_bytes(b"precious")
    else:
        (tmp_path / "OUT.partial").symlink_to(tmp_path / "missing")
    with pytest.raises(OutputError, match="was not made by shardsurgeon"):
        try_to_hold(tmp_path / "OUT")


@pytest.mark.skipif(os.name != "posix", reason="no links and pipes for everybody")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # A part that has a second name is begun again instead.
        *(("writing/one", kind) for kind in ("link", "pipe")),
        *product(
            ("shardsurgeon.journal", "shardsurgeon.journal.writing", "files", "x"),
            ("link", "file of two names", "pipe"),
        ),
    ],
)
def test_what_leads_elsewhere_and_was_laid_into_the_place_is_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    interrupted(tmp_path / "OUT")
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    laid = tmp_path / "OUT.partial" / name
    if laid.is_dir():
        laid.rename(tmp_path / "moved")
    laid.parent.mkdir(exist_ok=True)
    laid.unlink(missing_ok=True)
    if kind == "link":
        laid.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(laid)
    else:
        laid.hardlink_to(precious)
    with pytest.raises(OutputError, match=rf"is a {kind}.*, and shardsurgeon makes none"):
        try_to_hold(tmp_path / "OUT")
    assert precious.read_bytes() == b"precious" and os.path.lexists(laid)


def test_a_place_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "OUT.partial").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="is a link, and shardsurgeon makes none"):
        try_to_hold(tmp_path / "OUT")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices as POSIX has them")
@pytest.mark.parametrize("name", ["shardsurgeon.journal", "shardsurgeon.lock", "writing/one", "x"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder of a link"])
def test_what_is_neither_file_nor_folder_is_refused_and_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    interrupted(tmp_path / "OUT")
    path = tmp_path / "OUT.partial" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        (tmp_path / "OUT.partial").rename(tmp_path / "elsewhere")
        (tmp_path / "OUT.partial").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "shardsurgeon.journal").touch()
    with pytest.raises(OutputError, match=r"is a (pipe or a device|link), and shardsurgeon makes"):
        try_to_hold(tmp_path / "OUT")


def test_another_users_file_in_a_place_of_ones_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "OUT")
    theirs = tmp_path / "OUT.partial" / "writing" / "one"
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_bytes(b"theirs")

    def is_theirs(status: os.stat_result) -> bool:
        return status.st_ino == theirs.stat().st_ino

    monkeypatch.setattr("shardsurgeon.execution.workdir.is_strangers", is_theirs)
    with pytest.raises(OutputError, match="writing/one: belongs to another user"):
        try_to_hold(tmp_path / "OUT")


def test_a_part_that_a_backup_shares_is_not_written_on(tmp_path: Path) -> None:
    with (
        lock_workdir(tmp_path / "OUT", native()) as place,
        place.open_journal(RUN, restart=False),
    ):
        place.begin_file("one").write_bytes(b"12")
        assert place.has_part("one", 2)
        os.link(place.writing / "one", tmp_path / "backup")
        assert not place.has_part("one", 2)


@pytest.mark.skipif(os.name != "posix", reason="no owners")
@pytest.mark.parametrize(("user", "refused"), [(12345, True), (0, False)])
def test_another_users_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, refused: bool
) -> None:
    interrupted(tmp_path / "OUT")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if refused:
        with pytest.raises(OutputError, match="belongs to another user"):
            try_to_hold(tmp_path / "OUT")
    else:
        try_to_hold(tmp_path / "OUT")


@pytest.mark.parametrize(
    "leftovers",
    [(), ("shardsurgeon.lock",), ("shardsurgeon.lock", "shardsurgeon.journal.writing")],
)
def test_what_a_kill_in_the_first_moments_leaves_is_taken_over(
    tmp_path: Path, leftovers: tuple[str, ...]
) -> None:
    (tmp_path / "OUT.partial").mkdir()
    for name in leftovers:
        (tmp_path / "OUT.partial" / name).write_bytes(b"")
    with lock_workdir(tmp_path / "OUT", native()) as place:
        with place.open_journal(RUN, restart=False):
            finish(place, "one", b"1")
        place.publish({"one"})
    assert tree(tmp_path) == {"OUT/one"}


def test_a_second_run_on_the_same_out_is_refused_while_the_first_works(tmp_path: Path) -> None:
    with (
        lock_workdir(tmp_path / "OUT", native()),
        pytest.raises(OutputError, match="another run writes there now"),
    ):
        try_to_hold(tmp_path / "OUT")
    try_to_hold(tmp_path / "OUT")


def test_of_many_runs_that_come_and_go_never_two_hold_the_place(tmp_path: Path) -> None:
    holders: list[int] = []
    together: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        for _ in range(30):
            try:
                with lock_workdir(tmp_path / "OUT", native()):
                    holders.append(1)
                    together.append(len(holders))
                    holders.pop()
            except OutputError:
                pass
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(together) == {1}


@pytest.fixture
def delivering(tmp_path: Path) -> Iterator[WorkDir]:
    with lock_workdir(tmp_path / "OUT", native()) as place:
        with place.open_journal(RUN, restart=False):
            finish(place, "one", b"1")
        yield place


def test_a_file_that_the_run_did_not_write_is_not_delivered(delivering: WorkDir) -> None:
    (delivering.files / "stray.txt").write_bytes(b"")
    with pytest.raises(OutputError, match=r"stray\.txt: is not of this run"):
        delivering.publish({"one"})
    assert not delivering.out.exists()


def test_a_file_that_went_missing_stops_the_delivery(delivering: WorkDir) -> None:
    (delivering.files / "one").unlink()
    with pytest.raises(OutputWriteError, match="one: disappeared"):
        delivering.publish({"one"})


def test_an_out_that_appeared_meanwhile_is_not_replaced(delivering: WorkDir) -> None:
    delivering.out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        delivering.publish({"one"})
    assert os.listdir(delivering.out) == []


def test_leftovers_that_will_be_given_back_count_as_free(tmp_path: Path) -> None:
    disk = {"free": 100 << 20}  # others use the real one too
    place = WorkDir(tmp_path / "OUT", replace(native(), free_space=lambda path: disk["free"]))
    place.writing.mkdir(parents=True)
    before = place.space()
    (place.writing / "one").write_bytes(os.urandom(4 << 20))
    disk["free"] -= 4 << 20
    assert abs(place.space() - before) < 1 << 20


def test_a_lock_whose_file_another_run_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    folder, real = tmp_path / "OUT.partial", native()
    asked: list[bool] = []

    def lock(file: FileIO) -> bool:
        asked.append(real.lock(file))
        if len(asked) == 1:
            (folder / "shardsurgeon.lock").unlink()
        return asked[-1]

    with lock_workdir(tmp_path / "OUT", replace(real, lock=lock)) as workdir:
        assert asked == [True, True]
        with pytest.raises(OutputError, match="in use"), lock_workdir(workdir.out, real):
            pass


def test_half_a_journal_beside_a_whole_one_does_not_stay(tmp_path: Path) -> None:
    interrupted(tmp_path / "OUT")
    (tmp_path / "OUT.partial" / "shardsurgeon.journal").touch()
    half = tmp_path / "OUT.partial" / "shardsurgeon.journal.writing"
    half.write_bytes(b"{")
    try_to_hold(tmp_path / "OUT")
    assert not half.exists()
