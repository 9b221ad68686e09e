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
from collections.abc import Callable, Iterator
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
_ENTRY_NBYTES = len('"":{"dtype":"","shape":[],"data_offsets":[,]},')
_BETWEEN = ']},"'
_METADATA = re.compile(r'{"__metadata__":({[^{}\\]*}),(?=")')
_MAPPED = re.compile(rb'"weight_map"[ \t\n\r]*:[ \t\n\r]*{')
_FIRST = re.compile(rf'{_NAME}([ \t]*:[ \t]*)"({_TEXT})"([ \t\n\r]*,[ \t\n\r]*|\Z)')
# Text is taken apart in pieces of this size, so that what is made of it is never large.
_PIECE = 1 << 20

Extent = Callable[[str, tuple[int, ...]], int | None]
Found = list[tuple[str, ...]]


def read_columns(raw: bytes, extent: Extent) -> tuple[TensorTable, str] | None:
    """The tensors that a header lists, in the order of their bytes, and the text of its metadata.

    extent: bytes of a tensor of a dtype and shape, None for one that cannot be. The text is that of
    a JSON object, "" where there is none. None where the header is not spelled as expected, names
    a tensor twice, or its tensors do not follow one another without holes: then somebody else
    reads it.
    """
    try:
        text = raw.decode().rstrip(" ")
    except UnicodeDecodeError:
        return None
    metadata = _METADATA.match(text)
    begin = metadata.end() if metadata else 1
    if not text.startswith("{"):
        return None
    spelled: dict[tuple[str, str, str, str], int] = {}
    code: list[int] = []
    number: list[int] = []
    begins: list[int] = []
    ends: list[int] = []
    for found in _whole(_ENTRY, text, begin, _BETWEEN, _ENTRY_NBYTES):
        if not found:
            return None
        heads, numbers, tails, dtypes, shapes, starts, stops = zip(*found, strict=True)
        keys = zip(heads, tails, dtypes, shapes, strict=True)
        code += [spelled.setdefault(key, len(spelled)) for key in keys]
        number += [int(each) if each else UNNUMBERED for each in numbers]
        begins += map(int, starts)
        ends += map(int, stops)
    if any(map(_ESCAPED.search, chain.from_iterable(spelled))):
        return None
    series = [_series(*key, extent) for key in spelled]
    known = tuple(each for each in series if each is not None)
    if not known or len(known) < len(series):
        return None
    columns = (np.array(column, np.int64) for column in (code, number, begins))
    table = _in_order(TensorTable(known, *columns), np.array(ends, np.int64))
    return None if table is None else (table, metadata[1] if metadata else "")


def _whole(
    entry: re.Pattern[str], text: str, begin: int, between: str, around: int
) -> Iterator[Found]:
    """The groups of all entries from `begin` on, piece by piece; ends with an empty piece where
    anything else is in the text.

    between: how one entry ends and the next begins, with one character of that; around: characters
    of an entry that are in none of its groups. Entries do not overlap: if their lengths add up to
    the text's, there is nothing else.
    """
    read = begin
    while begin < len(text):
        cut = text.find(between, begin + _PIECE)
        end = len(text) if cut < 0 else cut + len(between) - 1
        found = entry.findall(text, begin, end)
        read += sum(map(len, chain.from_iterable(found))) + around * len(found)
        if read != end:
            break
        yield found
        begin = end
    else:
        return
    yield []


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


def cut_weight_map(raw: bytes) -> tuple[bytes, bytes] | None:
    """An index without the members of its weight map, and these alone; None where they cannot be
    told apart by looking."""
    match = _MAPPED.search(raw)
    if match is None or raw.count(b'"weight_map"') != 1:
        return None
    begin = match.end()
    end = raw.find(b"}", begin)
    if end < 0 or raw.find(b"{", begin, end) >= 0 or raw.find(b"\\", begin, end) >= 0:
        return None
    return raw[:begin] + raw[end:], raw[begin:end]


def read_weight_map(members: bytes) -> tuple[list[tuple[str, str, str]], Column, Column] | None:
    """What `cut_weight_map` cut out: ((head, tail, file) once each, and for each tensor its place
    in these and its number), or None where it is not spelled alike all through."""
    try:
        text = members.decode().strip(" \t\n\r")
    except UnicodeDecodeError:
        return None
    first = _FIRST.match(text)
    if first is None:
        return None
    colon, comma = first[4], first[6] or ","
    # The last entry has no comma: it gets one, so that all are of one length.
    entry = re.compile(rf'{_NAME}{re.escape(colon)}"({_TEXT})"{re.escape(comma)}')
    spelled: dict[tuple[str, str, str], int] = {}
    code: list[int] = []
    number: list[int] = []
    around = len('""""') + len(colon) + len(comma)
    for found in _whole(entry, text + comma, 0, f'"{comma}"', around):
        if not found:
            return None
        heads, numbers, tails, files = zip(*found, strict=True)
        code += [
            spelled.setdefault(key, len(spelled)) for key in zip(heads, tails, files, strict=True)
        ]
        number += [int(each) if each else UNNUMBERED for each in numbers]
    if any(map(_ESCAPED.search, chain.from_iterable(spelled))):
        return None
    # One string object per shard.
    known = {file: file for _, _, file in spelled}
    names = [(head, tail, known[file]) for head, tail, file in spelled]
    return names, np.array(code, np.int64), np.array(number, np.int64)
