"""The lines of a gzip file from a stranger, unpacked one after the other.

The file is one member, as RFC 1952 has it, and nothing behind it: what a reader that stops at the
end of the first member and one that goes on would read as two different files is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_PIECE_NBYTES = 1 << 16
_UNPACKED_NBYTES = 1 << 20
_WITH_GZIP_HEADER = 16 + zlib.MAX_WBITS


def lines_of(raw: bytes, most_in_line: int, most: int) -> Iterator[bytes]:
    """The lines of a whole gzip file, each with the end of line that it has.

    most_in_line, most: bytes of a line, and of all of them, when unpacked; no more than that is
    ever unpacked. Raises ValueError with what is wrong: the packed data is damaged, cut short or
    followed by more, or a limit is exceeded.
    """
    line = bytearray()
    left = most
    for piece in _unpacked(raw):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"unpacks to more than {most:,} bytes")
        begin = 0
        while (end := piece.find(b"\n", begin) + 1) > 0:
            line += piece[begin:end]
            _require_length(line, most_in_line)
            yield bytes(line)
            line.clear()
            begin = end
        line += piece[begin:]
        _require_length(line, most_in_line)
    if line:
        yield bytes(line)


def _unpacked(raw: bytes) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(_WITH_GZIP_HEADER)
    for at in range(0, len(raw), _PIECE_NBYTES):
        packed = raw[at : at + _PIECE_NBYTES]
        while not unpacker.eof:
            try:
                piece = unpacker.decompress(packed, _UNPACKED_NBYTES)
            except zlib.error as error:
                raise ValueError(f"cannot be unpacked ({error})") from error
            yield piece
            packed = unpacker.unconsumed_tail
            # A full piece: there may be more of it, although nothing is left of what is packed.
            if not packed and len(piece) < _UNPACKED_NBYTES:
                break
        if unpacker.eof:
            behind = len(unpacker.unused_data) or len(raw) - at - _PIECE_NBYTES
            if behind > 0:
                raise ValueError("has more bytes behind its end")
            return
    raise ValueError("is cut short")


def _require_length(line: bytearray, most: int) -> None:
    if len(line) > most:
        raise ValueError(f"has a line of more than {most:,} bytes")
