"""Headers and indexes read straight into columns, where they are spelled as libraries spell them.

Parsing JSON makes half a dozen objects of each of 200,000 tensors. Whoever writes a header or an
index writes every entry the same way, and a regular expression that knows this way is quicker and
keeps nothing. It reads the whole text, to the last character, or says that it does not: an escape,
an entry that is spelled otherwise, a number that does not fit, and the functions here give up. The
strict readers then decide, and say what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain

import numpy as np

from shardsurgeon.storage.formats.tensor_table import (
    NUMBER,
    UNNUMBERED,
    Column,
    Series,
    Stems,
    TensorTable,
)

# Offsets of up to 18 digits fit 64 bits.
_OFFSET = "0|[1-9][0-9]{0,17}"
_TEXT = '[^"]*'
# What JSON spells with an escape, or not at all: looked for in what is left of all names.
_ESCAPED = re.compile(r"[\\\x00-\x1f]")
# A name: what stands before its last number, the number, and the rest.
_NAME = rf'"(?:({_TEXT}\.)({NUMBER})(?=[."]))?({_TEXT})"'
_ENTRY = re.compile(
    rf'{_NAME}:{{"dtype":"([A-Z0-9_]+)","shape":\[([0-9,]*)\],'
    rf'"data_offsets":\[({_OFFSET}),({_OFFSET})\]}}(?:,|}}\Z)'
)
_AROUND = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
_BETWEEN = b']},"'
_METADATA = re.compile(rb'{"__metadata__":({[^{}\\]*}),(?=")')
_MAPPED = re.compile(rb'"weight_map"[ \t\n\r]*:[ \t\n\r]*{')
_FIRST = re.compile(rb'"[^"]*"([ \t]*:[ \t]*)"[^"]*"([ \t\n\r]*,[ \t\n\r]*|\Z)')
_WHITE = b" \t\n\r"
# Text is taken apart in pieces of this size, so that what is made of it is never large.
_PIECE = 1 << 20

Extent = Callable[[str, tuple[int, ...]], int | None]
# A text, and where in it to begin and end.
Stretch = tuple[bytes, int, int]


def read_columns(raw: bytes, extent: Extent) -> tuple[TensorTable, bytes] | None:
    """The tensors that a header lists, in the order of their bytes, and the text of its metadata.

    extent: bytes of a tensor of a dtype and shape, None for one that cannot be. The text is that of
    a JSON object, "" where there is none. None where the header is not spelled as expected, names
    a tensor twice, or its tensors do not follow one another without holes: then somebody else
    reads it.
    """
    if not raw.startswith(b"{"):
        return None
    metadata = _METADATA.match(raw)
    spelled: dict[tuple[str, str, str, str], int] = {}
    code: list[int] = []
    number: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    at, end = metadata.end() if metadata else 1, len(raw.rstrip(b" "))
    while at < end:
        upto = _cut(raw, at, end, _BETWEEN)
        try:
            text = raw[at:upto].decode()
        except UnicodeDecodeError:
            return None
        columns = [*zip(*_ENTRY.findall(text), strict=True)] or [()]
        # Entries do not overlap: if their lengths add up to the text's, nothing else is in it.
        if sum(map(len, map("".join, columns))) + _AROUND * len(columns[0]) != len(text):
            return None
        heads, numbers, tails, dtypes, shapes, starts, stops = columns
        keys = zip(heads, tails, dtypes, shapes, strict=True)
        code += [spelled.setdefault(key, len(spelled)) for key in keys]
        number += [int(each) if each else UNNUMBERED for each in numbers]
        begins += map(int, starts)
        ends += map(int, stops)
        at = upto
    if any(map(_ESCAPED.search, chain.from_iterable(spelled))):
        return None
    series = [_series(*key, extent) for key in spelled]
    known = tuple(each for each in series if each is not None)
    if not known or len(known) < len(series):
        return None
    rows = (np.array(column, np.int64) for column in (code, number, begins))
    table = _in_order(TensorTable(known, *rows), np.array(ends, np.int64))
    return None if table is None else (table, metadata[1] if metadata else b"")


def _cut(raw: bytes, begin: int, end: int, between: bytes) -> int:
    """Where a piece of a text that begins there ends: behind an entry.

    between: how one entry ends and the next begins, with one character of that.
    """
    cut = raw.find(between, begin + _PIECE, end)
    return end if cut < 0 else cut + len(between) - 1


def _series(head: str, tail: str, dtype: str, shape: str, extent: Extent) -> Series | None:
    if (head + tail) == "__metadata__":
        return None
    try:
        sizes = tuple(json.loads(f"[{shape}]"))
    except ValueError:
        return None
    nbytes = extent(dtype, sizes)
    return None if nbytes is None else Series(head, tail, dtype, sizes, nbytes)


def _in_order(table: TensorTable, end: Column) -> TensorTable | None:
    """The table in the order of its bytes; None where they have holes or a name occurs twice."""
    if not np.array_equal(table.end, end):
        return None
    order = np.lexsort((end, table.begin))
    if not np.array_equal(order, np.arange(len(order))):
        table, end = table.select(order), end[order]
    if table.begin[:1].any() or not np.array_equal(table.begin[1:], end[:-1]):
        return None
    keys = np.sort(Stems().keys(table))
    return None if (keys[1:] == keys[:-1]).any() else table


def find_weight_map(raw: bytes) -> Stretch | None:
    """Where the members of an index's weight map stand; None where that is not plain to see."""
    match = _MAPPED.search(raw)
    if match is None or raw.count(b'"weight_map"') != 1:
        return None
    begin = match.end()
    end = raw.find(b"}", begin)
    if end < 0 or raw.find(b"{", begin, end) >= 0 or raw.find(b"\\", begin, end) >= 0:
        return None
    return raw, begin, end


def read_weight_map(stretch: Stretch) -> dict[str, str] | None:
    """What a weight map says, tensor name → shard, one string object per shard; None where it is
    not spelled alike all through or has a name twice."""
    raw, begin, end = stretch
    while begin < end and raw[begin] in _WHITE:
        begin += 1
    while end > begin and raw[end - 1] in _WHITE:
        end -= 1
    first = _FIRST.match(raw, begin, end)
    if first is None:
        return None
    colon, comma = first[1].decode(), first[2].decode()
    between = f'"{comma}"'.encode()
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}
    count = 0
    while begin < end:
        upto = _cut(raw, begin, end, between) if comma else end
        try:
            text = raw[begin:upto].decode()
        except UnicodeDecodeError:
            return None
        if upto == end:
            text += comma
        # "name": "shard", and so on: every other part of the text is between quotes.
        parts = text.split('"')
        names, shards = parts[1::4], parts[3::4]
        if parts[0] or {*parts[2::4]} != {colon} or {*parts[4::4]} != {comma}:
            return None
        if len(parts) % 4 != 1 or not "".join(names).isprintable():
            return None
        files.update((each, each) for each in {*shards} - files.keys())
        weight_map |= zip(names, map(files.__getitem__, shards), strict=True)
        count += len(names)
        begin = upto
    return weight_map if len(weight_map) == count else None
