"""A batch carried out: the bytes it writes, and the memory it leaves as it was."""

from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest

from shardsurgeon.execution.plan import Literal, Segment
from shardsurgeon.execution.ranges import CopyRange
from shardsurgeon.execution.transfer import RangeTransfer
from shardsurgeon.execution.workers import Progress, ProgressMeter
from shardsurgeon.storage.local import LocalSource
from shardsurgeon.storage.system import native, portable


def test_what_is_written_leaves_memory_in_two_steps_but_for_blocks_in_part(
    tmp_path: Path,
) -> None:
    gone: list[tuple[int, int]] = []
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(bytes(50_000))
    (tmp_path / "out").write_bytes(bytes(90_000))
    batch = [
        CopyRange(Literal(b"HH"), 0),
        CopyRange(Segment("a", 0, 10_000), 2),
        CopyRange(Segment("a", 10_000, 9_000), 40_000),
        CopyRange(Segment("a", 20_000, 5_000), 80_000),
    ]
    system = replace(portable(), let_go=lambda file, begin, end: gone.append((begin, end)))
    meter = ProgressMeter(Progress(0, 12, 0, 0, 1), None)
    transfer = RangeTransfer(LocalSource(tmp_path / "model"), system, meter)
    # The third has no whole block.
    whole = [(0, 8_192), (40_960, 45_056)]
    assert transfer.write(batch, tmp_path / "out", [(57_344, 61_440)]) == whole
    assert gone == [(57_344, 61_440), *whole]


@pytest.mark.parametrize("was_there", [True, False])
def test_a_copy_leaves_the_memory_as_it_was_found(tmp_path: Path, was_there: bool) -> None:
    asked: list[tuple[str, int]] = []
    gone: list[tuple[str, int, int]] = []

    def in_memory(file: FileIO, offset: int) -> bool:
        asked.append((Path(str(file.name)).name, offset))
        return was_there

    def let_go(file: FileIO, begin: int, end: int) -> None:
        gone.append((Path(str(file.name)).name, begin, end))

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(bytes(range(100)))
    (tmp_path / "model" / "b").write_bytes(bytes(range(100, 200)))
    (tmp_path / "out").write_bytes(b"")
    moves = [
        CopyRange(Literal(b"HH"), 0),
        CopyRange(Segment("a", 10, 5), 2),
        CopyRange(Segment("a", 40, 3), 7),
        CopyRange(Segment("b", 0, 2), 10),
    ]
    system = replace(native(), in_memory=in_memory, let_go=let_go)
    meter = ProgressMeter(Progress(0, 12, 0, 0, 1), None)
    RangeTransfer(LocalSource(tmp_path / "model"), system, meter).write(moves, tmp_path / "out")
    assert asked == [("a", 42), ("b", 1)]
    assert gone == ([] if was_there else [("a", 10, 43), ("b", 0, 2)])
    assert (tmp_path / "out").read_bytes() == b"HH" + bytes(
        [10, 11, 12, 13, 14, 40, 41, 42, 100, 101]
    )
