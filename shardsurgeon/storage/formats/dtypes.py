"""Element types: from the bytes of a tensor to numbers numpy can calculate with.

Score files come in every width torch and safetensors know, numpy lacks several of them
(BF16, the F8 family), and selection wants one type. Here every float becomes float64, every
integer int64 (or uint64), exactly: none of the sources is wider than its target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """A tensor in a file that has not been read yet.

    dtype: the spelling of safetensors headers (`F32`, `BF16`, …), `C32` and `C128` beside
    them, or the file's own name for a type that is not a plain number (`bits8`).
    load: reads it, as float64, int64, uint64, bool or complex128 in `shape`; raises
    ScoreError where the file does not hold what it says.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Array]


# Element type → what torch calls it, where it has one.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
# The same of numpy, little-endian.
NUMPY_NAMES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
    "C64": "<c8",
}
# Element type → the numpy type of its bytes and the type its numbers are given in.
_NATIVE: dict[str, tuple[str, str]] = {
    "BOOL": ("u1", "?"),
    "U8": ("u1", "i8"),
    "I8": ("i1", "i8"),
    "U16": ("<u2", "i8"),
    "I16": ("<i2", "i8"),
    "U32": ("<u4", "i8"),
    "I32": ("<i4", "i8"),
    "U64": ("<u8", "u8"),
    "I64": ("<i8", "i8"),
    "F16": ("<f2", "f8"),
    "F32": ("<f4", "f8"),
    "F64": ("<f8", "f8"),
    "C64": ("<c8", "c16"),
    "C128": ("<c16", "c16"),
}


def _eight_bit_floats(exponent_bits: int, bias: int, special: str) -> npt.NDArray[np.float64]:
    """The 256 values of a float of one byte, by the definitions of the OCP 8-bit formats.

    special: what is set aside for NaN and infinity. "ieee": the whole top exponent;
    "top": only the two codes with all bits below the sign set; "minus zero": only 0x80.
    """
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.ldexp(1 + mantissa, exponent - bias)
    subnormal = np.ldexp(mantissa, np.full(256, 1 - bias))
    values: npt.NDArray[np.float64] = np.where(exponent == 0, subnormal, normal) * np.where(
        codes & 0x80, -1.0, 1.0
    )
    if special == "ieee":
        top = exponent == (1 << exponent_bits) - 1
        values[top & (mantissa > 0)] = np.nan
        values[top & (mantissa == 0)] *= np.inf
    elif special == "top":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[0x80] = np.nan
    return values


def _powers_of_two() -> npt.NDArray[np.float64]:
    """F8_E8M0: an exponent and nothing else; 0xFF is NaN."""
    values = np.ldexp(1.0, np.arange(256) - 127)
    values[0xFF] = np.nan
    return values


_EIGHT_BIT: dict[str, npt.NDArray[np.float64]] = {
    "F8_E4M3": _eight_bit_floats(4, 7, "top"),
    "F8_E5M2": _eight_bit_floats(5, 15, "ieee"),
    "F8_E4M3FNUZ": _eight_bit_floats(4, 8, "minus zero"),
    "F8_E5M2FNUZ": _eight_bit_floats(5, 16, "minus zero"),
    "F8_E8M0": _powers_of_two(),
}

ITEM_NBYTES: dict[str, int] = {
    **{name: np.dtype(stored).itemsize for name, (stored, _) in _NATIVE.items()},
    **dict.fromkeys(_EIGHT_BIT, 1),
    "BF16": 2,
    "C32": 4,
}
"""Bytes per element of every type that `decode` knows."""


def decode(dtype: str, raw: bytes) -> Array:
    """The numbers in `raw`, little-endian elements of type `dtype`, as a flat array.

    Floats come as float64, integers as int64 (U64 as uint64), BOOL as bool, complex types as
    complex128. `dtype` must be one of ITEM_NBYTES and `raw` a whole number of elements.
    """
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs that become quiet
        return _decode(dtype, raw)


def _decode(dtype: str, raw: bytes) -> Array:
    if dtype in _EIGHT_BIT:
        return np.take(_EIGHT_BIT[dtype], np.frombuffer(raw, "u1"))
    if dtype == "BF16":
        # A BF16 is the upper half of a float32.
        widened = np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)
        return np.asarray(widened.view("<f4"), np.float64)
    if dtype == "C32":
        parts = np.frombuffer(raw, "<f2").astype(np.float64)
        return np.asarray(parts.view(np.complex128))
    stored, wanted = _NATIVE[dtype]
    return np.frombuffer(raw, stored).astype(wanted)
