"""Shards as moves: joined, in source order, cut into batches that cover every byte once."""

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.execution.plan import Literal, OutputShard, OutputTensor, Segment
from shardsurgeon.execution.ranges import (
    CopyRange,
    batches,
    claimed_ranges,
    copy_ranges,
    joined,
    remaining,
    shared_nbytes,
    whole_block_ranges,
)
from shardsurgeon.storage.sharing import whole_blocks
from tests.support import tiny_job


def shard(*pieces: Segment | Literal) -> OutputShard:
    """One tensor per piece; the header is the two bytes HH."""
    tensors = [OutputTensor(f"t{n}", "U8", (p.nbytes,), (p,)) for n, p in enumerate(pieces)]
    return tiny_job.shard("out.safetensors", b"HH", *tensors)


def test_segments_that_follow_one_another_on_both_sides_are_joined() -> None:
    pieces = [Segment("a", 10, 5), Segment("a", 15, 5), Segment("a", 20, 1), Segment("a", 30, 4)]
    assert copy_ranges(shard(*pieces)) == [
        CopyRange(Literal(b"HH"), 0),
        CopyRange(Segment("a", 10, 11), 2),
        CopyRange(Segment("a", 30, 4), 13),
    ]


def test_an_empty_tensor_between_two_does_not_keep_them_apart() -> None:
    pieces: list[Segment | Literal]
    pieces = [Segment("a", 10, 5), Segment("b", 0, 0), Literal(b""), Segment("a", 15, 5)]
    assert copy_ranges(shard(*pieces))[1:] == [CopyRange(Segment("a", 10, 10), 2)]


def test_a_literal_between_two_keeps_them_apart() -> None:
    pieces: list[Segment | Literal]
    pieces = [Segment("a", 10, 5), Literal(b"x"), Segment("a", 15, 5)]
    assert copy_ranges(shard(*pieces))[1:] == [
        CopyRange(Literal(b"x"), 7),
        CopyRange(Segment("a", 10, 5), 2),
        CopyRange(Segment("a", 15, 5), 8),
    ]


def test_the_same_offset_of_another_file_does_not_follow() -> None:
    pieces = [Segment("a", 10, 5), Segment("b", 15, 5)]
    assert copy_ranges(shard(*pieces))[1:] == [
        CopyRange(Segment("a", 10, 5), 2),
        CopyRange(Segment("b", 15, 5), 7),
    ]


def test_ranges_are_read_in_source_order_whatever_their_place_in_the_shard() -> None:
    pieces = [Segment("b", 0, 1), Segment("a", 90, 2), Segment("a", 10, 3)]
    assert copy_ranges(shard(*pieces))[1:] == [
        CopyRange(Segment("a", 10, 3), 5),
        CopyRange(Segment("a", 90, 2), 3),
        CopyRange(Segment("b", 0, 1), 2),
    ]


def test_long_moves_are_cut_and_short_ones_share_a_batch() -> None:
    moves = [
        CopyRange(Literal(b"HH"), 0),
        CopyRange(Segment("a", 100, 25), 2),
        CopyRange(Segment("a", 0, 4), 27),
    ]
    assert batches(moves, 10) == [
        (CopyRange(Literal(b"HH"), 0),),
        (CopyRange(Segment("a", 100, 10), 2),),
        (CopyRange(Segment("a", 110, 10), 12),),
        (CopyRange(Segment("a", 120, 5), 22), CopyRange(Segment("a", 0, 4), 27)),
    ]


def test_an_empty_file_is_one_batch_that_moves_nothing() -> None:
    assert batches([CopyRange(Segment("a", 0, 0), 0)], 10) == [(CopyRange(Segment("a", 0, 0), 0),)]
    assert batches([], 10) == []


_pieces = st.lists(
    st.one_of(
        st.builds(Segment, st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 30)),
        st.builds(Literal, st.binary(max_size=5)),
    ),
    max_size=12,
)
FILES = {"a": bytes(range(70)), "b": bytes(range(100, 170))}


def content(piece: Segment | Literal) -> bytes:
    if isinstance(piece, Literal):
        return piece.data
    return FILES[piece.file][piece.begin : piece.begin + piece.nbytes]


def write(moves: Iterable[CopyRange], written: list[int | None]) -> None:
    for move in moves:
        for offset, byte in enumerate(content(move.piece), start=move.at):
            assert written[offset] is None
            written[offset] = byte


@given(_pieces, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_batches_write_every_byte_of_a_shard_exactly_once(
    pieces: list[Segment | Literal], limit: int
) -> None:
    expected = b"HH" + b"".join(map(content, pieces))
    written: list[int | None] = [None] * len(expected)
    for batch in batches(copy_ranges(shard(*pieces)), limit):
        assert sum(move.piece.nbytes for move in batch) <= limit or len(batch) == 1
        write(batch, written)
    assert written == list(expected)


@given(_pieces, st.data())
@settings(max_examples=200, deadline=None)
def test_what_remains_is_exactly_what_was_not_written(
    pieces: list[Segment | Literal], data: st.DataObject
) -> None:
    expected = b"HH" + b"".join(map(content, pieces))
    there = data.draw(st.sets(st.integers(0, len(expected) - 1)))
    written = [byte if at in there else None for at, byte in enumerate(expected)]
    ranges = joined((at, at + 1) for at in there)
    write(remaining(copy_ranges(shard(*pieces)), ranges), written)
    assert written == list(expected)


def test_what_remains_keeps_the_order_and_cuts_no_more_than_it_must() -> None:
    moves = [
        CopyRange(Literal(b"HHHH"), 0),
        CopyRange(Segment("a", 50, 20), 10),
        CopyRange(Segment("b", 0, 6), 4),
    ]
    assert remaining(moves, []) == moves
    assert remaining(moves, [(0, 3), (8, 12), (15, 16), (29, 99)]) == [
        CopyRange(Literal(b"H"), 3),
        CopyRange(Segment("a", 52, 3), 12),
        CopyRange(Segment("a", 56, 13), 16),
        CopyRange(Segment("b", 0, 4), 4),
    ]


def test_ranges_are_joined_where_they_touch_or_overlap() -> None:
    assert joined([(9, 12), (0, 3), (5, 5), (3, 4), (10, 11), (6, 9)]) == [(0, 4), (6, 12)]
    assert joined([]) == []


BLOCK = 4096
_places = st.integers(0, 6 * BLOCK)


@given(_places, _places, st.integers(0, 5 * BLOCK))
@settings(max_examples=500, deadline=None)
def test_the_whole_blocks_of_a_copy_are_all_that_lie_alike_in_both_files(
    begin: int, at: int, nbytes: int
) -> None:
    first, last = whole_blocks(begin, at, nbytes)
    alike = {
        block
        for block in range(0, at + nbytes, BLOCK)
        if at <= block and block + BLOCK <= at + nbytes and (begin + block - at) % BLOCK == 0
    }
    assert set(range(first, last, BLOCK)) == alike
    assert at <= first <= last <= at + nbytes


_long_pieces = st.lists(
    st.one_of(
        st.builds(Segment, st.sampled_from("ab"), _places, st.integers(0, 4 * BLOCK)),
        # Such that it lies as in the source behind a header of two bytes, or a block later.
        st.builds(Segment, st.just("a"), st.sampled_from([2, BLOCK + 2]), st.just(3 * BLOCK)),
        st.builds(Literal, st.binary(max_size=5)),
    ),
    max_size=6,
)


@given(_long_pieces, st.integers(BLOCK, 3 * BLOCK), st.sets(st.sampled_from("ab")))
@settings(max_examples=200, deadline=None)
def test_cutting_between_blocks_shares_as_much_as_not_cutting(
    pieces: list[Segment | Literal], limit: int, sharable: set[str]
) -> None:
    whole = copy_ranges(shard(*pieces))
    cut = [copy for batch in batches(whole, limit) for copy in batch]
    assert shared_nbytes(cut, sharable) == shared_nbytes(whole, sharable)
    assert sum(copy.piece.nbytes for copy in cut) == sum(copy.piece.nbytes for copy in whole)
    assert all(copy.piece.nbytes <= limit for copy in cut)


@given(_long_pieces, st.sets(st.sampled_from("ab")))
@settings(max_examples=200, deadline=None)
def test_no_shared_block_is_claimed_and_all_is_where_none_is_shared(
    pieces: list[Segment | Literal], sharable: set[str]
) -> None:
    ranges = copy_ranges(shard(*pieces))
    size = sum(copy.piece.nbytes for copy in ranges)
    assert claimed_ranges(ranges, ()) == [(0, size)]
    shared = set()
    for copy in ranges:
        if isinstance(copy.piece, Segment) and copy.piece.file in sharable:
            first, last = whole_blocks(copy.piece.begin, copy.at, copy.piece.nbytes)
            shared |= set(range(first, last, BLOCK))
    assert shared_nbytes(ranges, sharable) == len(shared) * BLOCK
    for begin, end in claimed_ranges(ranges, sharable):
        assert not any(begin < block + BLOCK and block < end for block in shared)
        assert (begin, end) == (0, size) or end - begin >= 64 << 10


def test_small_ranges_between_shared_ones_are_not_claimed() -> None:
    long = 20 * BLOCK
    ranges = [
        CopyRange(Literal(b"H" * 100), 0),
        CopyRange(Segment("a", 100, long), 100),
        CopyRange(Segment("b", 7, long), 100 + long),
        CopyRange(Segment("a", 100 + 5 * BLOCK, long), 100 + 2 * long),
        CopyRange(Segment("b", 0, 3_000), 100 + 3 * long),
    ]
    assert claimed_ranges(ranges, {"a"}) == [(long, 2 * long + BLOCK)]
    assert claimed_ranges(ranges, {"c"}) == [(0, 3_100 + 3 * long)]


@given(_long_pieces)
@settings(max_examples=200, deadline=None)
def test_the_blocks_that_a_batch_fills_are_filled_by_it_alone(
    pieces: list[Segment | Literal],
) -> None:
    ranges = copy_ranges(shard(*pieces))[::2]
    filled = whole_block_ranges(ranges)
    written = {at for copy in ranges for at in range(copy.at, copy.end)}
    blocks = {at // BLOCK for at in written}
    expected = {b for b in blocks if written.issuperset(range(b * BLOCK, (b + 1) * BLOCK))}
    assert {b // BLOCK for begin, end in filled for b in range(begin, end, BLOCK)} == expected
    assert all(begin < end for begin, end in filled)
