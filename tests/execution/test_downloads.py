"""Remote ranges: few requests, few bytes too many, every byte in its place."""

import random
from collections import Counter
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.errors import SourceReadError
from shardsurgeon.execution.plan import Literal, Segment
from shardsurgeon.execution.ranges import CopyRange
from shardsurgeon.execution.transfer import MAX_GAP_NBYTES, Downloader, gaps, max_gap, requests
from shardsurgeon.execution.workers import Progress, ProgressMeter, Stopped
from shardsurgeon.storage.source import MemorySource
from shardsurgeon.storage.system import native
from tests.support.far_source import FarSource

DATA = bytes(range(256)) * 4


def meter() -> ProgressMeter:
    return ProgressMeter(Progress(0, 0, 0, 0, 0), None)


def fetch(
    source: MemorySource, moves: list[CopyRange], target: Path, gap: int, counts: ProgressMeter
) -> bytes:
    target.write_bytes(b"." * max((move.end for move in moves), default=0))
    with FileIO(target, "r+") as file:
        Downloader(source, native(), counts, gap).fetch("f", moves, file)
    return target.read_bytes()


def test_moves_are_fetched_together_where_the_gap_is_narrow_enough() -> None:
    moves = [
        CopyRange(Segment("f", 10, 5), 100),
        CopyRange(Segment("f", 15, 5), 0),
        CopyRange(Segment("f", 23, 5), 50),
        CopyRange(Segment("f", 32, 5), 60),
        CopyRange(Segment("f", 30, 9), 80),
    ]
    assert [list(one) for one in requests(moves, 3)] == [moves[:3], moves[3:4], moves[4:]]
    assert [list(one) for one in requests(moves, 0)] == [moves[:2], *([m] for m in moves[2:])]
    assert list(requests([], 3)) == []


def test_the_gap_is_as_wide_as_a_hundredth_of_the_wanted_bytes_pays_for() -> None:
    found = Counter({10: 5, 20: 1, 30: 1})
    assert max_gap(found, 100 * 100) == 30
    assert max_gap(found, 100 * 100 - 1) == 20
    assert max_gap(found, 70 * 100 - 1) == 10
    assert max_gap(found, 50 * 100 - 1) == 0
    assert max_gap(Counter(), 10**9) == 0


def test_a_gap_that_costs_more_than_a_request_is_never_read_over() -> None:
    found = Counter({MAX_GAP_NBYTES: 1, MAX_GAP_NBYTES + 1: 1})
    assert max_gap(found, 10**15) == MAX_GAP_NBYTES


def test_gaps_lie_between_neighbours_of_one_file() -> None:
    moves = [
        CopyRange(Literal(b"HH"), 0),
        CopyRange(Segment("f", 0, 10), 0),
        CopyRange(Segment("f", 10, 10), 0),
        CopyRange(Segment("f", 25, 10), 0),
        CopyRange(Segment("f", 30, 10), 0),
        CopyRange(Segment("g", 90, 10), 0),
        CopyRange(Segment("g", 107, 10), 0),
    ]
    assert list(gaps(moves)) == [5, 7]


_ranges = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 90)), min_size=1, max_size=12
)  # (gap before it, length)


@given(_ranges, st.randoms(use_true_random=False), st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_any_ranges_in_any_pieces_arrive_whole_and_in_their_places(
    tmp_path_factory: pytest.TempPathFactory,
    ranges: list[tuple[int, int]],
    order: random.Random,
    piece: int,
) -> None:
    at, segments = 0, []
    for before, nbytes in ranges:
        segments.append(Segment("f", at + before, nbytes))
        at += before + nbytes
    data = (DATA * 2)[:at]
    places = list(range(len(segments)))
    order.shuffle(places)
    offsets, end = {}, 0
    for place in places:
        offsets[place] = end
        end += segments[place].nbytes
    moves = [CopyRange(segment, offsets[number]) for number, segment in enumerate(segments)]
    source, counts = FarSource({"f": data}, piece), meter()
    gap = max_gap(Counter(gaps(moves)), 100 * at // 4)  # so that some gaps pay and some do not
    written = fetch(source, moves, tmp_path_factory.mktemp("d") / "out", gap, counts)
    expected = b"".join(
        data[s.begin : s.begin + s.nbytes] for s in map(segments.__getitem__, places)
    )
    assert written == expected
    assert counts.downloaded == source.nbytes == end + sum(g for g in gaps(moves) if g <= gap)
    assert len(source.requests) == 1 + sum(g > gap for g in gaps(moves))


def test_only_what_travels_is_counted_as_downloaded(tmp_path: Path) -> None:
    counts = meter()
    fetch(
        MemorySource({"f": DATA}), [CopyRange(Segment("f", 0, 50), 0)], tmp_path / "out", 0, counts
    )
    assert counts.downloaded == 0


def test_an_empty_file_is_not_asked_for(tmp_path: Path) -> None:
    source = FarSource({"f": b""})
    assert fetch(source, [CopyRange(Segment("f", 0, 0), 0)], tmp_path / "out", 0, meter()) == b""
    assert source.requests == []


def test_a_stream_that_ends_early_is_told_with_both_offsets(tmp_path: Path) -> None:
    class Short(FarSource):
        def read(self, name: str, begin: int, end: int) -> bytes:
            return super().read(name, begin, min(end, 70)) if begin < 70 else b""

    moves = [CopyRange(Segment("f", 10, 90), 0)]
    with pytest.raises(SourceReadError, match="far/f: ended at byte 70, byte 100 was expected"):
        fetch(Short({"f": DATA}, 50), moves, tmp_path / "out", 0, meter())


def test_whoever_waits_for_a_server_can_be_stopped_and_hangs_up(tmp_path: Path) -> None:
    counts, ended = meter(), []

    class Waiting(FarSource):
        def stream(self, name: str, begin: int, end: int):  # type: ignore[no-untyped-def]
            try:
                yield b"x"
                counts.stop()
                while True:
                    yield b""
            finally:
                ended.append(name)

    with pytest.raises(Stopped):
        fetch(Waiting({"f": DATA}), [CopyRange(Segment("f", 0, 9), 0)], tmp_path / "out", 0, counts)
    assert ended == ["f"]
