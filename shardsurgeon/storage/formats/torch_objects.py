"""What the names in torch.save's pickles stand for: nothing of the file is looked up or called.

Listed are tensors and how torch rebuilds them, storages, dtypes, plain containers and numpy
scalars. All other names are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from shardsurgeon.errors import ScoreError
from shardsurgeon.storage.formats.dtypes import ITEM_NBYTES, StoredArray, decode
from shardsurgeon.storage.formats.torch_tensors import (
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Storage,
    TensorReader,
    View,
)
from shardsurgeon.storage.formats.zip_reader import ZipReader

# The advice for a file that torch may understand and this reader does not.
CONVERT = (
    "if you trust the file, open it with torch.load(path, weights_only=True) and torch.save "
    "its tensors again as {layer: {metric: tensor}}"
)
_DAMAGED = "the file is damaged: fetch it again"
_NUMPY_DTYPES = {"f8": "F64", "f4": "F32", "f2": "F16", "b1": "BOOL"} | {
    f"{kind}{nbytes}": f"{kind.upper()}{8 * nbytes}" for kind in "iu" for nbytes in (1, 2, 4, 8)
}
_MAX_COUNTS = 100  # more than any tensor has dimensions
_TENSOR_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that may be called or passed to a call, but may not be part of the value."""

    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    """A storage class; dtype None where it has no type of its own."""

    dtype: str | None


@dataclass(frozen=True, slots=True)
class _NumpyDtype:
    """The type of a numpy scalar, in our spelling."""

    dtype: str


class TorchObjects:
    """The values that the names, calls and persistent ids of one file's pickle become.

    `named`, `called`, `given_state`, `persistent` and `require_result` are what the interpreter
    asks; each raises ScoreError for what is not on the lists.
    """

    def __init__(self, archive: ZipReader, root: str) -> None:
        """root: the folder inside the archive whose `data/` holds the storages."""
        self._archive = archive
        self._root = root
        self._tensors = TensorReader(archive)

    def named(self, module: str, name: str) -> object:
        """A dtype as its name, any other listed name as a _Name or a _StorageType."""
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
            raise self._fault("its pickle calls something that is not a function")
        value = _CALLS[function.name](self, arguments)
        if value is None:
            raise self._fault(f"its pickle calls {function.name} with malformed arguments")
        return value

    def given_state(self, target: object, state: object) -> object:
        """The target itself: only states that change nothing here are accepted."""
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
            raise self._fault("its pickle refers to something outside that is not a storage")
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

    def require_result(self, value: object) -> None:
        """Refuse a name or a storage that no call has used: only tensors may be in a result."""
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
    """Whether it could be a shape. A long tuple is refused unread: many calls could share it."""
    if not isinstance(value, tuple) or len(value) > _MAX_COUNTS:
        return False
    return all(_is_count(item) for item in value)


_Call: TypeAlias = Callable[[TorchObjects, tuple[object, ...]], object]

_TENSOR_CALLS: dict[str, _Call] = {
    "torch._utils._rebuild_tensor_v2": TorchObjects.tensor,
    "torch._utils._rebuild_tensor_v3": TorchObjects.tensor_of_dtype,
    "torch._utils._rebuild_parameter": TorchObjects.inner_tensor,
    "torch._utils._rebuild_parameter_with_state": TorchObjects.inner_tensor,
}
# Protocols up to 2 spell builtins by their name in Python 2.
_BUILTINS: dict[str, _Call] = {
    "set": TorchObjects.members,
    "frozenset": TorchObjects.members,
    "bytes": TorchObjects.raw_bytes,
    "bytearray": TorchObjects.raw_bytes,
    "complex": TorchObjects.complex_number,
    "dict": TorchObjects.mapping,
}
_CALLS: dict[str, _Call] = {
    **_TENSOR_CALLS,
    "torch._tensor._rebuild_from_type_v2": TorchObjects.tensor_with_attributes,
    "torch.Size": TorchObjects.size,
    "torch.device": TorchObjects.device,
    "collections.OrderedDict": TorchObjects.mapping,
    "collections.defaultdict": TorchObjects.mapping,
    "collections.Counter": TorchObjects.mapping,
    "_codecs.encode": TorchObjects.raw_bytes,
    "numpy.dtype": TorchObjects.numpy_dtype,
    "numpy.core.multiarray.scalar": TorchObjects.numpy_scalar,
    "numpy._core.multiarray.scalar": TorchObjects.numpy_scalar,
    **{
        f"{module}.{name}": call
        for module in ("builtins", "__builtin__")
        for name, call in _BUILTINS.items()
    },
}
