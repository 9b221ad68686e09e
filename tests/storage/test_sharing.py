"""Whether files can share blocks with a folder: tried once for each device, and never assumed."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.storage.sharing import BlockSharing
from shardsurgeon.storage.system import System, portable
from tests.support.shared_blocks import BLOCK, Clones

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the imitation is POSIX's")


def opened(path: Path, nbytes: int) -> FileIO:
    path.write_bytes(os.urandom(nbytes))
    return FileIO(path)


def test_a_device_is_tried_once_with_the_first_file_that_is_long_enough(tmp_path: Path) -> None:
    clones = Clones()
    sharing = BlockSharing(tmp_path, clones.system(portable()))
    with (
        opened(tmp_path / "short", 2 * BLOCK - 1) as short,
        opened(tmp_path / "long", 2 * BLOCK) as long,
        opened(tmp_path / "other", 9 * BLOCK) as other,
    ):
        assert not sharing.works_for(short)
        assert clones.probes == 0
        assert sharing.works_for(long) and sharing.works_for(other) and sharing.works_for(short)
        assert clones.probes == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "other", "short"]


def no_share(*_: object) -> bool:
    return False


def failing(*_: object) -> bool:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize(
    ("call", "answer"),
    [("share", no_share), ("share", failing), ("unnamed", failing), ("unnamed", lambda _: None)],
)
def test_what_fails_in_the_trial_is_not_asked_again(
    tmp_path: Path, call: str, answer: Callable[..., object]
) -> None:
    asked: list[object] = []

    def counted(*arguments: object) -> object:
        asked.append(arguments)
        return answer(*arguments)

    system: System = replace(Clones().system(portable()), **{call: counted})  # type: ignore[arg-type]
    sharing = BlockSharing(tmp_path, system)
    with opened(tmp_path / "from", 9 * BLOCK) as source, FileIO(tmp_path / "to", "w+") as target:
        assert not sharing.works_for(source)
        assert not sharing.share(source, BLOCK, target, 0, BLOCK)
        assert target.read() == b""
    assert len(asked) == 1
    assert sharing.nbytes == 0


def test_what_is_shared_is_counted_and_nothing_is_not_asked_for(tmp_path: Path) -> None:
    clones = Clones(declined_from=1)
    sharing = BlockSharing(tmp_path, clones.system(portable()))
    with opened(tmp_path / "from", 9 * BLOCK) as source, FileIO(tmp_path / "to", "w+") as target:
        assert not sharing.share(source, 0, target, 0, 0)
        assert sharing.share(source, 2 * BLOCK, target, BLOCK, 3 * BLOCK)
        assert not sharing.share(source, 0, target, 0, BLOCK)
        assert clones.asked == 2
        assert sharing.nbytes == 3 * BLOCK
    data = (tmp_path / "from").read_bytes()
    assert (tmp_path / "to").read_bytes() == bytes(BLOCK) + data[2 * BLOCK : 5 * BLOCK]
