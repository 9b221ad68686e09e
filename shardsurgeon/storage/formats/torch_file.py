"""torch.save's files (`.pt`, `.pth`), read without torch and without running anything in them.

The container is a zip archive: `data.pkl` describes the value, every storage is a member beside
it. The names that the pickle may use are listed here: tensors and how torch rebuilds them,
storages, dtypes, plain containers, numpy scalars. All others are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeGuard

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import ITEM_NBYTES, StoredArray, decode
from shardsurgeon.storage.formats.pickle_reader import MAX_NBYTES, interpret
from shardsurgeon.storage.formats.torch_tensors import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Storage,
    TensorReader,
    View,
)
from shardsurgeon.storage.formats.zip_reader import ZipReader, read_range

CONVERT = (
    "if you trust the file, open it with torch.load(path, weights_only=True) and torch.save "
    "its tensors again as {layer: {metric: tensor}}"
)


def read_torch_file(path: Path, where: str) -> object:
    """The value that torch.save put into `path`, every tensor as an unread StoredArray.

    Dicts of any kind come as dict, torch.Size as tuple, dtypes and devices as their names
    (`torch.float32`, `cuda:0`), numpy scalars as Python's. Raises ScoreError for the formats
    of torch before 1.6, for every name that is not understood, and for whatever is broken.
    """
    _refuse_other_formats(read_range(path, 0, 512, where), where)
    archive = ZipReader(path, where)
    root = _root(archive)
    order = archive.read(f"{root}/byteorder", 16) if f"{root}/byteorder" in archive.entries else b""
    if order not in (b"", b"little"):
        raise ScoreError(
            where,
            f"its numbers are in byte order {order!r}, only little-endian files are read",
            "load it with torch on a little-endian machine and torch.save it again",
        )
    # One byte past the limit lets the interpreter see that there is too much.
    pickle = archive.read(f"{root}/data.pkl", _limit(archive, f"{root}/data.pkl"))
    return interpret(pickle, TorchMeaning(archive, root), where)


def _limit(archive: ZipReader, member: str) -> int | None:
    return MAX_NBYTES + 1 if archive.entries[member].nbytes > MAX_NBYTES else None


def _refuse_other_formats(head: bytes, where: str) -> None:
    if head.startswith(b"PK"):
        return
    if not head:
        problem = "the file is empty"
    elif head.startswith(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"):
        problem = "this is torch.save's old format, not the zip archive it writes since torch 1.6"
    elif head[257:262] == b"ustar":
        problem = "this is the tar format of torch before 0.2"
    elif head[0] == 0x80:
        problem = "this is a plain pickle, not a file of torch.save"
    else:
        problem = "this is not a file of torch.save: no zip archive"
    raise ScoreError(where, problem, CONVERT if head else "fetch it again")


def _root(archive: ZipReader) -> str:
    """The folder inside the archive that holds everything."""
    roots = [
        name.removesuffix("/data.pkl")
        for name in archive.entries
        if name.endswith("/data.pkl") and name.count("/") == 1
    ]
    if len(roots) != 1:
        problem = f"a zip archive with {len(roots)} members named data.pkl, torch.save writes one"
        raise ScoreError(archive.where, problem, CONVERT)
    if f"{roots[0]}/constants.pkl" in archive.entries:
        raise ScoreError(archive.where, "this is a TorchScript program, not saved scores", CONVERT)
    for entry in archive.entries.values():
        if entry.deflated:
            problem = f"member {entry.name} is compressed, torch.save stores its members"
            raise ScoreError(archive.where, problem, CONVERT)
    return roots[0]


"""The advice for a file that torch may understand and this reader does not."""

_DAMAGED = "the file is damaged: fetch it again"
_NUMPY_DTYPES = {"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL"} | {
    f"{kind}{nbytes}": f"{kind.upper()}{8 * nbytes}" for kind in "iu" for nbytes in (1, 2, 4, 8)
}
_MAX_COUNTS = 100  # more than any tensor has dimensions
_TENSOR_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that is understood where it is called or passed on, never as part of the value."""

    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    """A storage class; dtype None where it has no type of its own."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class _NumpyDtype:
    """The type of a numpy scalar, in our spelling."""

    dtype: str


class TorchMeaning:
    """What the words of one file's pickle mean. Implements pickle_meaning.Meaning."""

    def __init__(self, archive: ZipReader, root: str) -> None:
        """root: the folder inside the archive whose `data/` holds the storages."""
        self._archive = archive
        self._root = root
        self._tensors = TensorReader(archive)

    def named(self, module: str, name: str) -> object:
        """A dtype as its name, anything else as a mark that `called` and `persistent` know."""
        full = f"{module}.{name}"
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        if full == "torch.storage.UntypedStorage":
            return _StorageType(None)
        if module == "torch" and name in TORCH_DTYPES:
            return full
        if full in _CALLS or full in _TENSOR_CLASSES:
            return _Name(full)
        shown = ascii(full)[1:-1][:120]
        raise self._fault(
            f"its pickle names {shown}, which is not on the list of what is read", CONVERT
        )

    def called(self, function: object, arguments: tuple[object, ...]) -> object:
        """The value that the call would have made, made by us."""
        if not isinstance(function, _Name) or function.name not in _CALLS:
            raise self._fault("its pickle calls something that is no function")
        value = _CALLS[function.name](self, arguments)
        if value is None:
            raise self._fault(f"its pickle calls {function.name} with malformed arguments")
        return value

    def given_state(self, target: object, state: object) -> object:
        """The target itself: only states that change nothing here are let pass."""
        if isinstance(target, dict) and isinstance(state, dict):
            return target  # attributes of an OrderedDict, such as a state dict's _metadata
        if isinstance(target, _NumpyDtype) and isinstance(state, tuple) and len(state) > 1:
            if state[1] in ("<", "|", "="):
                return target
            raise self._fault("its pickle holds a numpy value that is not little-endian", CONVERT)
        raise self._fault("its pickle sets the state of an object", CONVERT)

    def persistent(self, key: object) -> object:
        """A storage: ("storage", class, member, device, number of elements)."""
        if not isinstance(key, tuple) or len(key) != 5 or key[0] != "storage":
            raise self._fault("its pickle refers to something outside that is no storage")
        _, kind, name, _, elements = key
        if (
            not isinstance(kind, _StorageType)
            or not isinstance(name, str)
            or not _is_count(elements)
        ):
            raise self._fault("its pickle describes a malformed storage")
        member = f"{self._root}/data/{name}"
        entry = self._archive.entries.get(member)
        if entry is None:
            raise self._fault(f"its storage {ascii(name)[:80]} is missing from the archive")
        item_nbytes = 1 if kind.dtype is None else ITEM_NBYTES[kind.dtype]
        if entry.nbytes != elements * item_nbytes:
            raise self._fault(
                f"its storage {name} has {entry.nbytes:,} bytes, "
                f"{elements:,} elements of {item_nbytes} bytes were saved"
            )
        return Storage(member, kind.dtype, entry.nbytes)

    def leaf(self, value: object) -> None:
        """Let tensors pass and refuse the marks that should have been used up."""
        if not isinstance(value, StoredArray):
            raise self._fault("its value holds a class or a bare storage", CONVERT)

    # How torch rebuilds tensors. Each returns None where the arguments are malformed.

    def tensor(self, arguments: tuple[object, ...]) -> object:
        """(storage, offset, size, stride, requires_grad, hooks[, metadata])"""
        if not 6 <= len(arguments) <= 7 or not isinstance(arguments[0], Storage):
            return None
        return self._view(arguments[0], arguments[0].dtype, arguments[1:4], arguments[6:])

    def tensor_of_dtype(self, arguments: tuple[object, ...]) -> object:
        """(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])"""
        if not 7 <= len(arguments) <= 8 or not isinstance(arguments[0], Storage):
            return None
        name = arguments[6]
        if not isinstance(name, str) or not name.startswith("torch."):
            return None
        dtype = TORCH_DTYPES.get(name.removeprefix("torch."))
        return self._view(arguments[0], dtype, arguments[1:4], arguments[7:])

    def _view(
        self,
        storage: Storage,
        dtype: str | None,
        place: tuple[object, ...],
        rest: tuple[object, ...],
    ) -> StoredArray | None:
        offset, shape, strides = place
        flags = rest[0] if rest and rest[0] is not None else {}
        if dtype is None or not _is_count(offset) or not isinstance(flags, dict):
            return None
        if not _are_counts(shape) or not _are_counts(strides):
            return None
        if not flags.keys() <= {"conj", "neg"}:
            return None
        conjugated, negated = (flags.get(flag) is True for flag in ("conj", "neg"))
        return self._tensors.describe(
            View(storage, dtype, offset, shape, strides, conjugated, negated)
        )

    def inner_tensor(self, arguments: tuple[object, ...]) -> object:
        """A parameter: (tensor, requires_grad, hooks[, state]). What torch adds is left out."""
        return arguments[0] if arguments and isinstance(arguments[0], StoredArray) else None

    def tensor_with_attributes(self, arguments: tuple[object, ...]) -> object:
        """(rebuild, class, arguments of rebuild, state): a plain tensor that carries attributes."""
        if len(arguments) != 4:
            return None
        rebuild, kind, inner, _ = arguments
        if not isinstance(rebuild, _Name) or not isinstance(inner, tuple):
            return None
        if not isinstance(kind, _Name) or kind.name not in _TENSOR_CLASSES:
            return None
        # Not through `called`: a call inside a call inside a call would exhaust the stack.
        return _TENSOR_CALLS[rebuild.name](self, inner) if rebuild.name in _TENSOR_CALLS else None

    # Plain values

    def mapping(self, arguments: tuple[object, ...]) -> object:
        """OrderedDict(), OrderedDict(items), Counter(dict), defaultdict(factory)"""
        if not arguments or isinstance(arguments[0], _Name):
            return {} if len(arguments) < 2 else None
        return dict(arguments[0]) if isinstance(arguments[0], dict) else None

    def members(self, arguments: tuple[object, ...]) -> object:
        """set(list) and frozenset(list)"""
        if not arguments:
            return set()
        items = arguments[0]
        if not isinstance(items, list | tuple | set | frozenset):
            return None
        scalar = all(item is None or isinstance(item, str | bytes | int | float) for item in items)
        return set(items) if scalar else None

    def size(self, arguments: tuple[object, ...]) -> object:
        """torch.Size(tuple)"""
        return arguments[0] if len(arguments) == 1 and _are_counts(arguments[0]) else None

    def device(self, arguments: tuple[object, ...]) -> object:
        """torch.device(type[, index])"""
        if not arguments or not isinstance(arguments[0], str):
            return None
        index = arguments[1] if len(arguments) > 1 else None
        return f"{arguments[0]}:{index}" if _is_count(index) else arguments[0]

    def raw_bytes(self, arguments: tuple[object, ...]) -> object:
        """_codecs.encode(str, "latin1"), how protocol 2 spells bytes; bytes(); bytearray(bytes)"""
        if not arguments:
            return b""
        text = arguments[0]
        if isinstance(text, bytes):
            return text
        if not isinstance(text, str) or arguments[1:] != ("latin1",):
            return None
        try:
            return text.encode("latin1")
        except UnicodeEncodeError:
            return None

    def complex_number(self, arguments: tuple[object, ...]) -> object:
        """complex(real, imaginary)"""
        if len(arguments) != 2:
            return None
        real, imaginary = arguments
        if not isinstance(real, int | float) or not isinstance(imaginary, int | float):
            return None
        return complex(real, imaginary)

    def numpy_dtype(self, arguments: tuple[object, ...]) -> object:
        """numpy.dtype(name, align, copy)"""
        if not arguments or not isinstance(arguments[0], str):
            return None
        name = arguments[0]
        if name not in _NUMPY_DTYPES:
            raise self._fault(f"its pickle holds a numpy value of type {ascii(name)[:40]}", CONVERT)
        return _NumpyDtype(_NUMPY_DTYPES[name])

    def numpy_scalar(self, arguments: tuple[object, ...]) -> object:
        """numpy's scalar(dtype, bytes)"""
        if len(arguments) != 2 or not isinstance(arguments[0], _NumpyDtype):
            return None
        dtype, raw = arguments[0].dtype, arguments[1]
        if not isinstance(raw, bytes) or len(raw) != ITEM_NBYTES[dtype]:
            return None
        value: object = decode(dtype, raw)[0].item()
        return value

    def _fault(self, problem: str, remedy: str = _DAMAGED) -> ScoreError:
        return ScoreError(self._archive.where, problem, remedy)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> TypeGuard[tuple[int, ...]]:
    """Whether it could be a shape; a long tuple is not looked through, call after call."""
    if not isinstance(value, tuple) or len(value) > _MAX_COUNTS:
        return False
    return all(_is_count(item) for item in value)


_Call: TypeAlias = Callable[[TorchMeaning, tuple[object, ...]], object]

_TENSOR_CALLS: dict[str, _Call] = {
    "torch._utils._rebuild_tensor_v2": TorchMeaning.tensor,
    "torch._utils._rebuild_tensor_v3": TorchMeaning.tensor_of_dtype,
    "torch._utils._rebuild_parameter": TorchMeaning.inner_tensor,
    "torch._utils._rebuild_parameter_with_state": TorchMeaning.inner_tensor,
}
# Protocols up to 2 spell builtins by their name in Python 2.
_BUILTINS: dict[str, _Call] = {
    "set": TorchMeaning.members,
    "frozenset": TorchMeaning.members,
    "bytes": TorchMeaning.raw_bytes,
    "bytearray": TorchMeaning.raw_bytes,
    "complex": TorchMeaning.complex_number,
    "dict": TorchMeaning.mapping,
}
_CALLS: dict[str, _Call] = {
    **_TENSOR_CALLS,
    "torch._tensor._rebuild_from_type_v2": TorchMeaning.tensor_with_attributes,
    "torch.Size": TorchMeaning.size,
    "torch.device": TorchMeaning.device,
    "collections.OrderedDict": TorchMeaning.mapping,
    "collections.defaultdict": TorchMeaning.mapping,
    "collections.Counter": TorchMeaning.mapping,
    "_codecs.encode": TorchMeaning.raw_bytes,
    "numpy.dtype": TorchMeaning.numpy_dtype,
    "numpy.core.multiarray.scalar": TorchMeaning.numpy_scalar,
    "numpy._core.multiarray.scalar": TorchMeaning.numpy_scalar,
    **{
        f"{module}.{name}": call
        for module in ("builtins", "__builtin__")
        for name, call in _BUILTINS.items()
    },
}
