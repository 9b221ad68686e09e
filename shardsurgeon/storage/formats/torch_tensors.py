"""Tensors of torch.save's files: storages, and views on them with offset and strides.

A storage is a flat run of elements, one uncompressed member of the archive; any number of
tensors view it. A view's place is checked against its storage when it is described, its
numbers are read when they are asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import ITEM_NBYTES, Array, StoredArray, decode
from shardsurgeon.storage.formats.zip_reader import ZipReader
from shardsurgeon.storage.limits import MAX_MEMBER_NBYTES

STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexDoubleStorage": "C128",
    "ComplexFloatStorage": "C64",
}
"""torch's typed storage classes → the type of their elements."""

_OPAQUE = {"bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "float4_e2m1fn_x2": 1}

TORCH_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex128": "C128",
    "complex64": "C64",
    "complex32": "C32",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    **{name: name for name in _OPAQUE},
}
"""torch's dtypes → ours. Packed types, which numpy cannot calculate with, keep torch's name."""

_MAX_DIMENSIONS = 32
_MAX_KEPT_NBYTES = 64 * 2**20
_MAX_ELEMENTS = 2**40  # beyond any file; keeps shapes within what numpy can address
_DAMAGED = "the file is damaged: fetch it again"


@dataclass(frozen=True, slots=True)
class Storage:
    """A member of the archive; dtype None where the file leaves the type to the tensors."""

    member: str
    dtype: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor lies in its storage; offset and strides count elements, as in torch.

    conjugated, negated: operations that torch had only noted and not yet carried out.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool = False
    negated: bool = False

    @property
    def elements(self) -> int:
        """How many elements the tensor has; an expanded one has more than its storage."""
        return math.prod(self.shape)

    @property
    def item_nbytes(self) -> int:
        """Bytes per element."""
        return ITEM_NBYTES.get(self.dtype) or _OPAQUE[self.dtype]

    @property
    def end(self) -> int:
        """One past the last element of the storage that the tensor reaches."""
        if not self.elements:
            return self.offset
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1

    def problem(self) -> str | None:
        """What is impossible about it, or None."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_DIMENSIONS:
            return f"{len(self.shape)} dimensions and {len(self.strides)} strides"
        if min(numbers) < 0:
            return "a negative size, stride or offset"
        if math.prod(size for size in self.shape if size) > _MAX_ELEMENTS:
            return f"shape {list(self.shape)}"
        available = self.storage.nbytes // self.item_nbytes
        if self.end > available:
            return f"elements up to {self.end:,} of a storage that has {available:,}"
        return None


class TensorReader:
    """Reads views from an archive, keeping the storages it has read: tensors often share them."""

    def __init__(self, archive: ZipReader) -> None:
        """archive: the opened file, whose members the views name."""
        self._archive = archive
        self._kept: dict[str, bytes] = {}
        # Expanded and overlapping views are legal, and could ask for any amount of memory.
        self._elements_left = 4 * archive.file_nbytes + 2**20

    def describe(self, view: View) -> StoredArray:
        """The tensor, unread. Raises ScoreError where the view leaves its storage."""
        problem = view.problem()
        if problem:
            raise ScoreError(
                self._archive.where, f"tensor in {view.storage.member}: {problem}", _DAMAGED
            )
        self._elements_left -= view.elements
        if self._elements_left < 0:
            raise ScoreError(
                self._archive.where,
                "its expanded or overlapping tensors have far more elements than the file bytes",
                "call .contiguous() or .clone() on the tensors before torch.save",
            )
        return StoredArray(view.dtype, view.shape, lambda: self._load(view))

    def _load(self, view: View) -> Array:
        if view.dtype in _OPAQUE:
            raise ScoreError(
                self._archive.where,
                f"a tensor of type torch.{view.dtype} holds packed bits, not numbers",
                "convert it to float32 before torch.save",
            )
        numbers = decode(view.dtype, self._gather(view)).reshape(view.shape)
        if view.conjugated:
            numbers = numbers.conj()
        return -numbers if view.negated else numbers

    def _gather(self, view: View) -> bytes:
        """The tensor's elements, row-major."""
        if not view.elements:
            return b""
        whole = np.frombuffer(
            self._storage(view.storage.member),
            dtype=f"V{view.item_nbytes}",
            count=view.storage.nbytes // view.item_nbytes,
        )
        strides = [stride * view.item_nbytes for stride in view.strides]
        placed = np.lib.stride_tricks.as_strided(whole[view.offset :], view.shape, strides)
        return placed.tobytes()

    def _storage(self, member: str) -> bytes:
        """A member's content. Members are kept up to _MAX_KEPT_NBYTES, then all are dropped."""
        if member not in self._kept:
            nbytes = self._archive.entries[member].nbytes
            if nbytes > MAX_MEMBER_NBYTES:
                problem = f"a tensor lies in a storage of {nbytes:,} bytes, more than any scores"
                remedy = "call .clone() on the tensors before torch.save"
                raise ScoreError(self._archive.where, problem, remedy)
            content = self._archive.read(member)
            if len(content) + sum(map(len, self._kept.values())) > _MAX_KEPT_NBYTES:
                self._kept.clear()
            self._kept[member] = content
        return self._kept[member]
