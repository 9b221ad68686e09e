"""numpy's `.npz`: a zip archive of `.npy` members, read without numpy's object pickles.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import Array, StoredArray, decode
from shardsurgeon.storage.formats.zip_reader import ZipReader

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 10_000  # numpy's own limit
_DTYPES = {
    "b1": "BOOL",
    **{f"f{n}": f"F{8 * n}" for n in (2, 4, 8)},
    **{f"c{n}": f"C{8 * n}" for n in (8, 16)},
    **{f"{kind}{n}": f"{kind.upper()}{8 * n}" for kind in "iu" for n in (1, 2, 4, 8)},
}
# The header is a Python dict as text. numpy evaluates it as a literal and then accepts negative and
# boolean sizes; three patterns are stricter, and hostile text does not reach Python's parser.
_DESCR = re.compile(r"'descr'\s*:\s*'([^']*)'")
_FORTRAN = re.compile(r"'fortran_order'\s*:\s*(True|False)")
_SHAPE = re.compile(r"'shape'\s*:\s*\(((?:\s*[0-9]{1,19}\s*,)*(?:\s*[0-9]{1,19}\s*)?)\)")
_DAMAGED = "the file is damaged: save it again with np.savez"


def read_npz(path: Path, where: str) -> dict[str, StoredArray]:
    """The arrays of an `.npz` file by name, unread.

    Raises ScoreError for a file that is not such an archive, for arrays of Python objects, records
    or other types that are not numbers, and for members that are not arrays.
    """
    archive = ZipReader(path, where)
    return {
        name.removesuffix(".npy"): _Member(archive, name).describe() for name in archive.entries
    }


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a `.npy` header says. begin: where the elements begin within the member."""

    dtype: str
    item_nbytes: int
    big_endian: bool
    fortran: bool
    shape: tuple[int, ...]
    begin: int

    def arranged(self, raw: bytes) -> Array:
        """The numbers of the elements `raw`, in the array's shape."""
        if self.big_endian:
            part = self.item_nbytes // (2 if self.dtype in ("C64", "C128") else 1)
            raw = np.frombuffer(raw, f">u{part}").astype(f"<u{part}").tobytes()
        return decode(self.dtype, raw).reshape(self.shape, order="F" if self.fortran else "C")


class _Member:
    """One `.npy` member of an archive."""

    def __init__(self, archive: ZipReader, name: str) -> None:
        self._archive = archive
        self._name = name

    def describe(self) -> StoredArray:
        """The array, unread; its size is compared with the member's."""
        head = self._archive.read(self._name, len(_MAGIC) + 6 + _MAX_HEADER)
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + 6:
            raise self._fault("is not a numpy array")
        wide = head[len(_MAGIC)] > 1
        begin = len(_MAGIC) + (6 if wide else 4)
        (length,) = struct.unpack_from("<I" if wide else "<H", head, len(_MAGIC) + 2)
        if length > min(_MAX_HEADER, len(head) - begin):
            raise self._fault(f"has a header of {length:,} bytes")
        layout = self._parse(head[begin : begin + length], begin + length)
        held = self._archive.entries[self._name].nbytes - layout.begin
        needed = math.prod(layout.shape) * layout.item_nbytes
        if held != needed:
            raise self._fault(f"has {held:,} bytes of data, its header says {needed:,}")
        return StoredArray(layout.dtype, layout.shape, lambda: self._load(layout))

    def _load(self, layout: _Layout) -> Array:
        return layout.arranged(self._archive.read(self._name)[layout.begin :])

    def _parse(self, raw: bytes, begin: int) -> _Layout:
        text = raw.decode("latin1")
        order, sizes = _FORTRAN.search(text), _SHAPE.search(text)
        if not order or not sizes or "'descr'" not in text:
            raise self._fault("has a header that is not numpy's")
        found = _DESCR.search(text)
        descr = found[1] if found else ""
        if descr[1:] not in _DTYPES or descr[0] not in "<>|=":
            shown = f"type {ascii(descr)[:40]}" if found else "records"
            raise self._fault(f"holds {shown}", "save plain numbers, such as float32")
        shape = tuple(int(size) for size in re.findall("[0-9]+", sizes[1]))
        # Zeros apart, so that no empty array has sizes that numpy cannot address.
        if len(shape) > 32 or math.prod(size for size in shape if size) > 2**40:
            raise self._fault(f"has the shape {list(shape)[:8]}")
        dtype, big_endian = _DTYPES[descr[1:]], descr[0] == ">"
        return _Layout(dtype, int(descr[2:]), big_endian, order[1] == "True", shape, begin)

    def _fault(self, problem: str, remedy: str = _DAMAGED) -> ScoreError:
        return ScoreError(self._archive.where, f"member {self._name} {problem}", remedy)
