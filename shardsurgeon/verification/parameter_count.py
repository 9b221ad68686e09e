"""How many parameters a model can have at least and at most, by what its tensors take.

The index's number is worked out from the scheme of every weight; here each tensor is only asked
how many weights of the narrowest and of the widest kind its bytes can hold. Words that were counted
as if each were a parameter, or the other way round, fall outside.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np

from shardsurgeon.storage.formats.tensor_table import Series, TensorTable

_FLOATS = ("F64", "F32", "F16", "BF16", "C64")
_WORDS = ("I32", "U32")
_NO_WEIGHTS = ("I64", "U64", "BOOL", *_WORDS)
_WORD = 32
# Weights that are packed into words, in whatever scheme.
_PACKED = re.compile(r".*(?:\.qweight|_packed|\.weight)")
# What stands beside weights and may or may not be counted.
_BESIDE = re.compile(
    r".*(?:scales?|scale_inv|scale_2|zero_point|zeros|biases|g_idx|_shape|absmax|quant_map|SCB"
    r"|weight_format|quant_state\..*)"
)
# Of integers that are packed into words.
_LEAST_BITS, _MOST_BITS = 2, 8


def parameter_bounds(tables: Iterable[TensorTable]) -> tuple[int, int]:
    """(least, most) parameters of a model whose tensors are these."""
    least = most = 0
    for table in tables:
        counts = np.bincount(table.code, minlength=len(table.series)).tolist()
        for series, count in zip(table.series, counts, strict=True):
            fewest, greatest = _bounds(series)
            least += count * fewest
            most += count * greatest
    return least, most


def _bounds(tensor: Series) -> tuple[int, int]:
    """The same of one tensor of a series."""
    # The patterns ask for the end of a name, and for no number between dots.
    name, elements = tensor.head + tensor.tail, math.prod(tensor.shape)
    if tensor.dtype in _WORDS and len(tensor.shape) > 1 and _PACKED.fullmatch(name):
        # The last word of a row, along whichever dimension it lies, may hold fewer than fit.
        rows = elements // max(min(tensor.shape), 1)
        return (elements - rows) * _WORD // _MOST_BITS, elements * _WORD // _LEAST_BITS
    if tensor.dtype in _NO_WEIGHTS:
        return 0, 0
    # A byte may be a weight, two of four bits, or a part of one of six.
    sure = tensor.dtype != "U8" and not _BESIDE.fullmatch(name)
    return elements if sure else 0, elements if tensor.dtype in _FLOATS else 2 * elements
