"""Safetensors headers: bytes to Header with every check, and back. Opens no file.

A file is an 8-byte little-endian length, that many bytes of JSON, and then the data section:
every tensor's bytes, without holes. The JSON maps tensor names to dtype, shape and offsets
relative to the data section: https://github.com/huggingface/safetensors#format

`parse_header` accepts nothing that the safetensors library refuses. It is stricter where the
library lets an ambiguity pass: repeated names, unknown keys, white space before the brace.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NoReturn

import numpy as np

from shardsurgeon.errors import HeaderError
from shardsurgeon.storage.formats.columns import read_columns
from shardsurgeon.storage.formats.strict_json import Repeated, brief, is_text, read_object
from shardsurgeon.storage.formats.tensor_table import Series, Stems, TensorRecord, TensorTable
from shardsurgeon.storage.limits import HEADER, MIB, json_problem
from shardsurgeon.units import BLOCK_NBYTES

PREFIX_NBYTES = 8

_DTYPES_BY_BITS = (
    (4, "F4"),
    (6, "F6_E2M3 F6_E3M2"),
    (8, "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"),
    (16, "I16 U16 F16 BF16"),
    (32, "I32 U32 F32"),
    (64, "I64 U64 F64 C64"),
)
DTYPE_BITS: dict[str, int] = {
    dtype: bits for bits, dtypes in _DTYPES_BY_BITS for dtype in dtypes.split()
}

_METADATA = "__metadata__"
# Of a shorter header the columns take less memory than any header may, whatever it says.
_UNCOUNTED = 16 * MIB
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_COUNT = 2**63 - 1  # readers count bits, and so bytes and elements, in 64-bit integers
_LFS_PREFIX = b"version "  # how a Git LFS pointer file begins

_FETCH_AGAIN = "fetch this shard again"
_WRITE_AGAIN = "fetch this shard again or write it anew with the safetensors library"


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    tensors: in offset order; zero-size tensors at equal offsets keep the file's order.
    metadata: the `__metadata__` map, None where the header has none.
    data_begin: absolute file offset of the data section.
    """

    tensors: TensorTable = field(repr=False)
    metadata: dict[str, str] | None
    data_begin: int


def header_length(prefix: bytes, file_nbytes: int, where: str) -> int:
    """Length in bytes of the JSON that follows the 8-byte prefix, checked against the file.

    prefix: the first 8 bytes of the file, or all of a shorter one. Call this before reading
    the header, so that an absurd length is never allocated. Raises HeaderError.
    """
    if len(prefix) < PREFIX_NBYTES:
        raise HeaderError(
            where,
            f"the file has {file_nbytes:,} bytes, a safetensors file has at least 8",
            _FETCH_AGAIN,
        )
    if prefix[:PREFIX_NBYTES] == _LFS_PREFIX:
        raise HeaderError(
            where,
            "this is a Git LFS pointer, not the file it points to",
            "run `git lfs pull`",
        )
    length = int.from_bytes(prefix[:PREFIX_NBYTES], "little")
    _check_length(length, file_nbytes, where)
    return length


def parse_header(raw: bytes, file_nbytes: int, where: str) -> Header:
    """Turn the JSON bytes that follow the prefix into a Header.

    raw: exactly the bytes `header_length` announced; file_nbytes: size of the whole file;
    where: the file, as messages name it. Raises HeaderError naming the tensor and the numbers
    for whatever breaks the format or does not fit the file.
    """
    _check_length(len(raw), file_nbytes, where)
    data_begin = PREFIX_NBYTES + len(raw)
    # What could take too much memory is for the strict reader, which refuses it.
    is_vast = len(raw) > _UNCOUNTED and json_problem(raw, HEADER)
    found = None if is_vast else read_columns(raw, _extent_or_none)
    if found is not None and _fills(found[0], file_nbytes - data_begin):
        reader = _HeaderReader(where)
        metadata = reader.load(found[1]) if found[1] else None
        return Header(found[0], reader.metadata(metadata), data_begin)
    return header_of(_HeaderReader(where).load(raw), data_begin, file_nbytes, where)


def header_of(entries: dict[str, object], data_begin: int, file_nbytes: int, where: str) -> Header:
    """The Header of JSON that is read already: tensor names and, maybe, `__metadata__`.

    data_begin: where the data section begins in the file; the others and what is raised: as for
    `parse_header`.
    """
    reader = _HeaderReader(where)
    metadata = reader.metadata(entries.pop(_METADATA, None))
    tensors = TensorTable.of(reader.tensors(entries, file_nbytes - data_begin))
    return Header(tensors, metadata, data_begin)


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Exact data size of a tensor in bytes.

    Raises ValueError where the elements of a sub-byte dtype do not fill whole bytes, and
    KeyError for a dtype that is not in DTYPE_BITS.
    """
    nbits = math.prod(shape) * DTYPE_BITS[dtype]
    if nbits % 8:
        raise ValueError(f"{nbits} bits are not whole bytes")
    return nbits // 8


def _fills(table: TensorTable, data_nbytes: int) -> bool:
    return data_nbytes == (int(table.end[-1]) if len(table) else 0)


def _extent_or_none(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None for what no reader takes."""
    # Zeros are left out: the library multiplies from the left and meets them too late.
    nbits = math.prod(filter(None, shape)) * DTYPE_BITS.get(dtype, _MAX_COUNT)
    if dtype not in DTYPE_BITS or nbits > _MAX_COUNT or max(shape, default=0) > _MAX_COUNT:
        return None
    nbits = math.prod(shape) * DTYPE_BITS[dtype]
    return None if nbits % 8 else nbits // 8


def build_header(
    tensors: TensorTable | Sequence[tuple[str, str, tuple[int, ...], int]],
    metadata: dict[str, str] | None,
    start: int | None = None,
) -> bytes:
    """The first bytes of a safetensors file: length prefix and JSON.

    tensors: a table, or (name, dtype, shape, nbytes), in the order of their data, which follows
    without holes. The JSON is padded with spaces so that the data begins at a multiple of 8, or
    so that its offset is `start` modulo BLOCK_NBYTES.

    Raises ValueError for tensors that no file can hold (repeated names, nbytes that do not
    match dtype and shape: a defect of the caller), HeaderError where the result is longer
    than any reader accepts.
    """
    if not isinstance(tensors, TensorTable):
        begins = accumulate((nbytes for *_, nbytes in tensors), initial=0)
        tensors = TensorTable.of(
            TensorRecord(name, dtype, shape, begin, begin + nbytes)
            for (name, dtype, shape, nbytes), begin in zip(tensors, begins, strict=False)
        )
    _require_possible(tensors)
    text = _spelled(tensors, metadata).encode()
    unit, rest = (8, 0) if start is None else (BLOCK_NBYTES, start)
    text += b" " * ((rest - PREFIX_NBYTES - len(text)) % unit)
    if len(text) > HEADER.nbytes:
        raise HeaderError(
            "",
            f"the header of a shard of {len(tensors):,} tensors would be {len(text):,} bytes, "
            f"readers accept {HEADER.nbytes:,}",
            "`apply --max-shard-size` makes smaller ones",
        )
    return len(text).to_bytes(PREFIX_NBYTES, "little") + text


def _require_possible(tensors: TensorTable) -> None:
    for head, tail, dtype, shape, nbytes in tensors.series:
        if nbytes != tensor_nbytes(dtype, shape):
            name = repr(head + tail)
            raise ValueError(f"tensor {name}: {nbytes} bytes for {dtype} {list(shape)}")
    keys = np.unique(Stems().keys(tensors))
    if len(keys) < len(tensors) or any(each.tail == _METADATA for each in tensors.series):
        raise ValueError("a tensor name cannot be used twice or is reserved")


def _spelled(tensors: TensorTable, metadata: dict[str, str] | None) -> str:
    """The JSON: the metadata, then every tensor, with nothing between them that need not be."""
    spelled = [_entry_of(each) for each in tensors.series]
    end = np.cumsum(tensors.nbytes)
    rows = (tensors.code.tolist(), tensors.number.tolist(), end.tolist())
    entries = [] if metadata is None else [f'"{_METADATA}":{_json(metadata)}']
    begin = 0
    for code, number, upto in zip(*rows, strict=True):
        before, behind = spelled[code]
        number = number if number >= 0 else ""
        entries.append(f"{before}{number}{behind}{begin},{upto}]}}")
        begin = upto
    return f"{{{','.join(entries)}}}"


def _entry_of(series: Series) -> tuple[str, str]:
    """What an entry of a header has before the number in its name, and behind it."""
    shape = ",".join(map(str, series.shape))
    begins = f':{{"dtype":"{series.dtype}","shape":[{shape}],"data_offsets":['
    return _json(series.head)[:-1], f"{_json(series.tail)[1:]}{begins}"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_length(length: int, file_nbytes: int, where: str) -> None:
    if length > HEADER.nbytes:
        raise HeaderError(
            where,
            f"the header is said to be {length:,} bytes long, at most {HEADER.nbytes:,} are "
            "allowed",
            "this is not a safetensors file; " + _FETCH_AGAIN,
        )
    if length > file_nbytes - PREFIX_NBYTES:
        raise HeaderError(
            where,
            f"the header is said to be {length:,} bytes long, the file has {file_nbytes:,}",
            "the file is truncated: " + _FETCH_AGAIN,
        )


class _HeaderReader:
    """Checks one header's JSON. Every refusal names the file and, where it can, the tensor."""

    def __init__(self, where: str) -> None:
        self._where = where
        # dtype and shape → one shared shape tuple and its size: a shard repeats few of them.
        self._extents: dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], int]] = {}

    def load(self, raw: bytes) -> dict[str, object]:
        """The header's members: tensor names and, maybe, `__metadata__`."""
        if not raw:
            self._refuse("the header is empty, the shortest is {}")
        if raw[:1] != b"{":
            self._refuse(f"the header begins with {brief(raw[:1])}, not with a brace")
        return read_object(raw, self._where, "the header", HeaderError, _WRITE_AGAIN, HEADER)

    def metadata(self, value: object) -> dict[str, str] | None:
        """The `__metadata__` map; null means none, as it does to the library."""
        if value is None:
            return None
        if isinstance(value, Repeated):
            self._refuse(f"{_METADATA} names {brief(value.key)} twice")
        if not isinstance(value, dict):
            self._refuse(f"{_METADATA} is {brief(value)}, not a map of strings")
        for key, text in value.items():
            if not is_text(key) or not is_text(text):
                self._refuse(f"{_METADATA} maps {brief(key)} to {brief(text)}, not to a string")
        return value

    def tensors(self, entries: dict[str, object], data_nbytes: int) -> tuple[TensorRecord, ...]:
        """All tensors in offset order; checks that they fill the data section exactly."""
        unplaced = [self._entry(name, entry) for name, entry in entries.items()]
        unplaced.sort(key=lambda entry: entry[:2])
        records: list[TensorRecord] = []
        cursor = 0
        for begin, end, name, dtype, shape in unplaced:
            if begin != cursor:
                self._refuse_gap(name, begin, cursor, records)
            if end > data_nbytes:
                self._refuse(
                    f"truncated: tensor {brief(name)} ends at byte {end:,} of the data, "
                    f"the file has {data_nbytes:,}",
                    remedy=_FETCH_AGAIN,
                )
            # Sharing the cursor saves an integer object for each of 200,000 tensors.
            records.append(TensorRecord(name, dtype, shape, cursor, end))
            cursor = end
        if cursor != data_nbytes:
            self._refuse(
                f"{data_nbytes - cursor:,} surplus bytes at the end: the tensors account for "
                f"{cursor:,} bytes of data, the file has {data_nbytes:,}"
            )
        return tuple(records)

    def _entry(self, name: str, entry: object) -> tuple[int, int, str, str, tuple[int, ...]]:
        """One tensor's begin, end, name, dtype and shape, its place not yet checked."""
        if not isinstance(entry, dict):
            if isinstance(entry, Repeated):
                self._refuse_tensor(name, f"its entry names {brief(entry.key)} twice")
            self._refuse_tensor(name, f"its entry is {brief(entry)}, not an object")
        if entry.keys() != _ENTRY_KEYS:
            self._refuse_tensor(name, _key_problem(entry))
        if not is_text(name):
            self._refuse_tensor(name, "the name holds a lone surrogate")
        begin, end = self._offsets(name, entry["data_offsets"])
        dtype = entry["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            self._refuse_tensor(
                name,
                f"unknown dtype {brief(dtype)}",
                remedy="supported are " + ", ".join(DTYPE_BITS),
            )
        shape, nbytes = self._extent(name, dtype, entry["shape"])
        if end - begin != nbytes:
            self._refuse_tensor(
                name,
                f"its offsets span {end - begin:,} bytes, "
                f"{dtype} {brief(list(shape))} takes {nbytes:,}",
            )
        return begin, end, name, sys.intern(dtype), shape

    def _offsets(self, name: str, value: object) -> tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2 or not _all_counts(value):
            self._refuse_tensor(
                name, f"its data_offsets are {brief(value)}, not two whole numbers below 2^63"
            )
        begin, end = value
        if end < begin:
            self._refuse_tensor(name, f"it ends at byte {end:,}, before its begin at {begin:,}")
        return begin, end

    def _extent(self, name: str, dtype: str, value: object) -> tuple[tuple[int, ...], int]:
        """The shape, shared between equal tensors, and the bytes it takes."""
        if not isinstance(value, list) or not _all_counts(value):
            self._refuse_tensor(
                name, f"its shape is {brief(value)}, not a list of whole numbers below 2^63"
            )
        shape = tuple(value)
        known = self._extents.get((dtype, shape))
        if known is not None:
            return known
        # Zeros are left out: the library multiplies from the left and meets them too late.
        if math.prod(filter(None, shape)) * DTYPE_BITS[dtype] > _MAX_COUNT:
            self._refuse_tensor(name, f"its shape {brief(value)} overflows 64 bits")
        try:
            nbytes = tensor_nbytes(dtype, shape)
        except ValueError:
            self._refuse_tensor(
                name,
                f"{dtype} {brief(value)} takes {math.prod(shape) * DTYPE_BITS[dtype]:,} bits, "
                "which are not whole bytes",
            )
        self._extents[dtype, shape] = shape, nbytes
        return shape, nbytes

    def _refuse_gap(
        self, name: str, begin: int, cursor: int, before: list[TensorRecord]
    ) -> NoReturn:
        after = f"tensor {brief(before[-1].name)} ends" if before else "the data begins"
        fault = "overlap" if begin < cursor else "hole"
        self._refuse_tensor(
            name,
            f"begins at byte {begin:,} but {after} at {cursor:,}: "
            f"{fault} of {abs(begin - cursor):,} bytes",
        )

    def _refuse_tensor(self, name: str, problem: str, remedy: str = _WRITE_AGAIN) -> NoReturn:
        self._refuse(f"tensor {brief(name)}: {problem}", remedy=remedy)

    def _refuse(self, problem: str, remedy: str = _WRITE_AGAIN) -> NoReturn:
        raise HeaderError(self._where, problem, remedy)


def _all_counts(values: list[object]) -> bool:
    """Whether all are whole numbers a reader can hold. True and 1.0 equal 1 but are refused."""
    # Half as slow as `all`, and a model has half a million.
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            return False
    return True


def _key_problem(entry: dict[str, object]) -> str:
    missing = sorted(_ENTRY_KEYS - entry.keys())
    if missing:
        return "its entry lacks " + " and ".join(missing)
    return f"its entry has the unknown key {brief(min(entry.keys() - _ENTRY_KEYS))}"
