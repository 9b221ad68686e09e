"""How many parameters a list of tensors stands for, packed and quantized ones included.

Pure: names, dtypes, shapes and the quantization part of the config in, a number out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

# Companions of a quantized weight: they describe parameters and are none.
_COMPANIONS = (
    "_scale", "_scale_inv", "_scale_2", "_global_scale", "_shape", "_zero_point", "_g_idx",
    ".scale", ".scales", "_scales", ".qzeros", ".g_idx",
)  # fmt: skip
_PACKED_WORDS = ("weight_packed", ".qweight")


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def count_parameters(tensors: Iterable[_Tensor], config: Mapping[str, Any]) -> int | None:
    """Parameters of the unquantized model, or None where packing hides their number.

    Words of I32 hold 32 / bits weights each, with the bits that the config names; bytes of
    packed FP4 (U8) hold two.
    """
    bits = _packed_bits(config)
    total = 0
    for tensor in tensors:
        if tensor.name.endswith(_COMPANIONS):
            continue
        elements = math.prod(tensor.shape)
        if tensor.dtype == "I32" and tensor.name.endswith(_PACKED_WORDS):
            if bits is None or 32 % bits:
                return None
            total += elements * (32 // bits)
        elif tensor.dtype == "U8":
            total += 2 * elements
        elif tensor.dtype not in ("I64", "I32", "BOOL"):
            total += elements
    return total


def count_stored_elements(tensors: Iterable[_Tensor]) -> int:
    """Elements as stored, packed or not: what some writers of an index call parameters."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _packed_bits(config: Mapping[str, Any]) -> int | None:
    """The one width that the config's quantization gives its packed weights, if it is one."""
    found = set(_bits(config))
    return found.pop() if len(found) == 1 else None


def _bits(node: object, inside: bool = False) -> Iterator[int]:
    if not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if inside and key in ("num_bits", "bits") and isinstance(value, int):
            yield value
        elif key not in ("input_activations", "output_activations", "kv_cache_scheme"):
            yield from _bits(value, inside or key == "quantization_config")
