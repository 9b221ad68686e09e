"""A file as torch.save writes it, from numpy arrays and without torch."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

# torch's storage classes by numpy's name of their numbers.
STORAGES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}


Place = TypeVar("Place", Path, BinaryIO)


class HalfStorage: ...


class FloatStorage: ...


class DoubleStorage: ...


class IntStorage: ...


class LongStorage: ...


class BoolStorage: ...


class ComplexFloatStorage: ...


class Size(tuple):
    """A shape, which torch pickles as a call of its class."""

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return Size, (tuple(self),)


def _rebuild_tensor_v2() -> None: ...


class _Stored:
    """An array's numbers, which the pickle names and does not hold."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array


class _Pickler(pickle.Pickler):
    """Writes an array as a call of torch's function on a storage beside the pickle."""

    def __init__(self, out: io.BytesIO) -> None:
        # The names of protocol 2 are lines of text, which can be replaced.
        super().__init__(out, 2)
        self.storages: list[bytes] = []

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Stored):
            return None
        self.storages.append(value.array.tobytes())
        kind = globals()[STORAGES[value.array.dtype.name]]
        return "storage", kind, str(len(self.storages) - 1), "cpu", value.array.size

    def reducer_override(self, value: object) -> object:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        # An expanded axis is stored once, and its stride is 0.
        expanded = [
            size > 1 and step == 0 for size, step in zip(value.shape, value.strides, strict=True)
        ]
        stored = value[tuple(slice(1) if one else slice(None) for one in expanded)].copy()
        strides = tuple(
            0 if one else step // value.itemsize
            for one, step in zip(expanded, stored.strides, strict=True)
        )
        arguments = (_Stored(stored), 0, value.shape, strides, False, OrderedDict())
        return _rebuild_tensor_v2, arguments


def pickled(value: object) -> tuple[bytes, list[bytes]]:
    """The pickle of a value, and the storages of the arrays in it, in its order."""
    out = io.BytesIO()
    pickler = _Pickler(out)
    pickler.dump(value)
    return as_torchs(out.getvalue()), pickler.storages


def as_torchs(pickle_: bytes) -> bytes:
    """The pickle with the names of this module's stand-ins replaced by those of torch."""
    here = f"c{__name__}\n".encode()
    pickle_ = pickle_.replace(here + b"_rebuild", b"ctorch._utils\n_rebuild")
    return pickle_.replace(here, b"ctorch\n")


def save(value: object, path: Place) -> Place:
    """Write `value`, containers of plain values and arrays, as torch.save does."""
    content, storages = pickled(value)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        for number, storage in enumerate(storages):
            file.writestr(f"archive/data/{number}", storage)
        file.writestr("archive/version", "3\n")
    return path
