"""Shards as moves: joined, in source order, cut into batches that cover every byte once."""

from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardsurgeon.copying import Move, Mover, batches, shard_moves
from shardsurgeon.sources.local import LocalSource
from shardsurgeon.surgeryplan import Literal, OutputShard, OutputTensor, Segment
from shardsurgeon.system import native


def shard(*pieces: Segment | Literal) -> OutputShard:
    """One tensor per piece; the header is the two bytes HH."""
    tensors = [OutputTensor(f"t{n}", "U8", (p.nbytes,), (p,)) for n, p in enumerate(pieces)]
    return OutputShard("out.safetensors", b"HH", tuple(tensors))


def test_segments_that_follow_one_another_on_both_sides_are_joined() -> None:
    pieces = [Segment("a", 10, 5), Segment("a", 15, 5), Segment("a", 20, 1), Segment("a", 30, 4)]
    assert shard_moves(shard(*pieces)) == [
        Move(Literal(b"HH"), 0),
        Move(Segment("a", 10, 11), 2),
        Move(Segment("a", 30, 4), 13),
    ]


def test_an_empty_tensor_between_two_does_not_keep_them_apart() -> None:
    pieces: list[Segment | Literal]
    pieces = [Segment("a", 10, 5), Segment("b", 0, 0), Literal(b""), Segment("a", 15, 5)]
    assert shard_moves(shard(*pieces))[1:] == [Move(Segment("a", 10, 10), 2)]


def test_a_literal_between_two_keeps_them_apart() -> None:
    pieces: list[Segment | Literal]
    pieces = [Segment("a", 10, 5), Literal(b"x"), Segment("a", 15, 5)]
    assert shard_moves(shard(*pieces))[1:] == [
        Move(Literal(b"x"), 7),
        Move(Segment("a", 10, 5), 2),
        Move(Segment("a", 15, 5), 8),
    ]


def test_the_same_offset_of_another_file_does_not_follow() -> None:
    pieces = [Segment("a", 10, 5), Segment("b", 15, 5)]
    assert shard_moves(shard(*pieces))[1:] == [
        Move(Segment("a", 10, 5), 2),
        Move(Segment("b", 15, 5), 7),
    ]


def test_ranges_are_read_in_source_order_whatever_their_place_in_the_shard() -> None:
    pieces = [Segment("b", 0, 1), Segment("a", 90, 2), Segment("a", 10, 3)]
    assert shard_moves(shard(*pieces))[1:] == [
        Move(Segment("a", 10, 3), 5),
        Move(Segment("a", 90, 2), 3),
        Move(Segment("b", 0, 1), 2),
    ]


def test_long_moves_are_cut_and_short_ones_share_a_batch() -> None:
    moves = [Move(Literal(b"HH"), 0), Move(Segment("a", 100, 25), 2), Move(Segment("a", 0, 4), 27)]
    assert batches(moves, 10) == [
        (Move(Literal(b"HH"), 0),),
        (Move(Segment("a", 100, 10), 2),),
        (Move(Segment("a", 110, 10), 12),),
        (Move(Segment("a", 120, 5), 22), Move(Segment("a", 0, 4), 27)),
    ]


def test_an_empty_file_is_one_batch_that_moves_nothing() -> None:
    assert batches([Move(Segment("a", 0, 0), 0)], 10) == [(Move(Segment("a", 0, 0), 0),)]
    assert batches([], 10) == []


_pieces = st.lists(
    st.one_of(
        st.builds(Segment, st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 30)),
        st.builds(Literal, st.binary(max_size=5)),
    ),
    max_size=12,
)


@given(_pieces, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_batches_write_every_byte_of_a_shard_exactly_once(
    pieces: list[Segment | Literal], limit: int
) -> None:
    files = {"a": bytes(range(70)), "b": bytes(range(100, 170))}

    def content(piece: Segment | Literal) -> bytes:
        if isinstance(piece, Literal):
            return piece.data
        return files[piece.file][piece.begin : piece.begin + piece.nbytes]

    expected = b"HH" + b"".join(map(content, pieces))
    written: list[int | None] = [None] * len(expected)
    for batch in batches(shard_moves(shard(*pieces)), limit):
        assert sum(move.piece.nbytes for move in batch) <= limit or len(batch) == 1
        for move in batch:
            for offset, byte in enumerate(content(move.piece), start=move.at):
                assert written[offset] is None
                written[offset] = byte
    assert written == list(expected)


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
        Move(Literal(b"HH"), 0),
        Move(Segment("a", 10, 5), 2),
        Move(Segment("a", 40, 3), 7),
        Move(Segment("b", 0, 2), 10),
    ]
    system = replace(native(), in_memory=in_memory, let_go=let_go)
    Mover(LocalSource(tmp_path / "model"), system, lambda n: None).move(moves, tmp_path / "out")
    assert asked == [("a", 42), ("b", 1)]
    assert gone == ([] if was_there else [("a", 10, 43), ("b", 0, 2)]) + [("out", 0, 12)]
    assert (tmp_path / "out").read_bytes() == b"HH" + bytes(
        [10, 11, 12, 13, 14, 40, 41, 42, 100, 101]
    )
